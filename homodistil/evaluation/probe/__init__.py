"""Probes of frozen features: what a checkpoint's hidden states know of sentences, without training the checkpoint.

Nothing is drawn at random, so two checkpoints differ by what they are and not by a seed. Modules: `features` (vectors
of sentences), `examples` (labelled sentences), `scores` (the four measures), `command` (`homodistil probe`).
"""
