"""The DeepSpeed engine: its JSON, how it is built, its optimizer, and native operators. Public API of DeepSpeed
only."""
