"""Student -> stock Hugging Face checkpoint with a model card, and how fast it runs."""
