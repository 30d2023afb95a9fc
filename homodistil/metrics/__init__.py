"""What a run records: metrics.jsonl, events.jsonl, TensorBoard, progress, the result table, the peak of the device."""
