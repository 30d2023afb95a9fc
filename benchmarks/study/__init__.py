"""The quality studies: which runs there are, who trains them, what is measured, how tables are made of it.

`benchmarks/quality.py` is the command. Everything is trained by `homodistil.training.run` as in a run of the product.
"""
