"""Which neurons go, and when: schedule (when) -> importance (how much each matters) -> selection (which stay)."""
