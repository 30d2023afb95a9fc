"""The DeepSpeed engine: its JSON config, construction, optimizer and compiled ops. Uses the public API of DeepSpeed."""
