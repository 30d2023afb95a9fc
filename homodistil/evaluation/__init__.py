"""How good a student is: held-out masked language modelling, and its distance to the teacher."""
