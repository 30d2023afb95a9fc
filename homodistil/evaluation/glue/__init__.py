"""GLUE: fine-tunes any checkpoint on the nine tasks (and a packaged set), and writes the scores to one table.

tasks.py (the tasks) -> sources.py (examples) -> fine_tuning.py (one run) -> grid.py (all runs) -> result_table.py
"""
