"""Terms of the objective, and what several of them share."""
