"""Small models and jobs, ranks of every kind, references and files that several test folders use."""
