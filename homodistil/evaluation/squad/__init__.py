"""SQuAD v1.1 and v2.0: fine-tune any checkpoint on the official JSON files and report exact match and F1.

examples.py (the files) -> features.py (windows of tokens) -> fine_tuning.py (one run) -> answers.py (spans to texts)
-> metrics.py (the official scores); grid.py (all runs, resumable, one table)
"""
