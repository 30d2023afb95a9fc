"""The quality studies: which runs there are, who trains them, what is measured, how tables are made of it.

`python -m experiments.quality` is the command. Everything is trained by `homodistil.training.run` as in a run of the
product.
"""
