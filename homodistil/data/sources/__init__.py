"""Where text and packaged models come from: files, URLs, the hub, packages."""
