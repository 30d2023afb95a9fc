"""EleutherAI's lm-evaluation-harness on exported decoders: its tasks, its model class, its scores, one table.

harness.py (tasks and scores) -> result_table.py
"""
