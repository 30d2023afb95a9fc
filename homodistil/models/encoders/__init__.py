"""Encoder families: one module per family."""
