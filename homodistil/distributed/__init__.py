"""Multi-rank infrastructure without models and DeepSpeed: launchers, groups, clean stops, exit codes, watchdog."""
