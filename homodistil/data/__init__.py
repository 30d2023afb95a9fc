"""Raw text -> tokenised blocks -> masked batches. Does not depend on DeepSpeed, models or losses.

sources/    packaged teachers and text, text files and data sets of the hub -> documents
prepare/    documents -> shards of tokens on disk -> split and packed blocks (`corpus.py`: all of this, cached)
loader.py, masked_lm.py, prefetch.py    blocks -> the masked batches of each rank and step
"""
