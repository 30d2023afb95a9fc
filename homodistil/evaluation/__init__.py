"""Evaluates a student: held-out masked language modelling, the distance to the teacher, GLUE and SQuAD."""
