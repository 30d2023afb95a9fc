"""GGUF, the format of llama.cpp: a stock model with its tokenizer in one file, read back before it is kept.

architectures.py says which models llama.cpp computes as they are, hyperparameters.py and tensors.py how it stores
them, vocabulary.py and sentence_pieces.py how it stores their tokenizers, file.py writes, reload.py reads and compares.
"""
