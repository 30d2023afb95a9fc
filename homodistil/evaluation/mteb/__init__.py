"""Sentence embedders on tasks of MTEB: its tasks, its retrieval, its scores, one table beside the teacher.

benchmark.py (tasks and scores, retrieval_data.py for local retrieval data) -> result_table.py
"""
