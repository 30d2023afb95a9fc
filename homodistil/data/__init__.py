"""Raw text -> tokenised blocks -> masked batches. Knows nothing of DeepSpeed, models or losses.

assets (packaged teachers and text) -> sources (documents) -> packing (blocks) -> corpus -> loader -> masking (Batch)
"""
