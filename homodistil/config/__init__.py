"""Run config: its schema, rules on values, the command line that fills it, and the shipped recipes."""
