"""GLUE: fine-tune any checkpoint on the nine tasks (and two packaged sets) and put the scores into one table.

tasks.py (what a task is) -> sources.py (examples) -> fine_tuning.py (one run) -> grid.py (all runs) -> result_table.py
"""
