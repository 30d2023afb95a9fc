"""Teacher, student, the loss terms between them and their weighted sum."""
