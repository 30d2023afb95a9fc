"""Sentence embedders and rerankers on tasks of MTEB: its tasks, its retrieval and scores, one table beside the teacher.

command.py -> checkpoints.py (embedders, rerankers), benchmark.py (tasks and scores, retrieval_data.py for local data)
-> score_all.py (with first_stage.py for rerankers) -> result_table.py
"""
