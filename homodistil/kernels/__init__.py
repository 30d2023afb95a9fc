"""Fused operations: one file per operation, with its public function, its form in plain torch and the choice between
the
two; the Triton kernels of `<operation>.py` are in `<operation>_triton.py`.

Operations that end in a loss compute the gradient in their forward and hold it, not the maps or logits it came from;
they return fp32 sums (the caller divides by the counts of the whole step), and the gradient they hold is that of the
sum.

Triton is imported by the `*_triton.py` files alone, and these on first use: everything here works without it.
"""
