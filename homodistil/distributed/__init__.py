"""Ranks and what surrounds them: launchers, groups, clean stops, exit codes, the watchdog. No model, no DeepSpeed."""
