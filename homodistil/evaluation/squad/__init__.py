"""SQuAD v1.1 and v2.0: fine-tunes any checkpoint on the official JSON files, and reports exact match and F1.

examples.py (files) -> features.py (windows of tokens) -> fine_tuning.py (one run) -> answers.py (spans to texts)
-> metrics.py (the official scores); grid.py does all runs, can be resumed, and writes the table.
"""
