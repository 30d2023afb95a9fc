"""The run config: its schema, rules on values, the command line, derived configs, and the shipped recipes."""
