"""Logs of a run: metrics.jsonl, events.jsonl, TensorBoard, progress, result table; and the peak FLOP/s of a device."""
