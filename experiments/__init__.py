"""Studies of quality; speed and memory are measured in benchmarks/."""
