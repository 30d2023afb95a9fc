"""Benchmarks: `python -m benchmarks.speed.throughput`, and so on; README.md lists every command."""
