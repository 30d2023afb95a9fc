"""A run: inputs, the loop, pruning events on the live engine, exports, and what is compared with it."""
