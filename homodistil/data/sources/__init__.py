"""Sources of text and packaged models: files, URLs, the Hugging Face hub, packages."""
