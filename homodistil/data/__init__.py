"""Raw text -> tokenised blocks -> masked batches. Knows nothing of DeepSpeed, models or losses.

assets (packaged teachers and text), files, hub -> sources -> documents
plan (shards) -> preparation (who makes which) -> shards (tokens on disk) -> merge (split, packing, manifest)
corpus (all of that, cached; integrity: still what was written?) -> loader -> masking (Batch)
"""
