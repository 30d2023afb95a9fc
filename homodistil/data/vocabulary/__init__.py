"""A smaller vocabulary: which pieces of a tokenizer stay, and the tokenizer that knows these alone.

counts = piece_counts(corpus.train, size)            # counts.py
smaller = cut_tokenizer(tokenizer, counts, "8192", fixed_ids)    # cut.py
smaller.kept, smaller.write(folder)                  # ids of the pieces that stay; files of the new tokenizer
"""
