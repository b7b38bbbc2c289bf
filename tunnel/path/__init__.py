"""What a path is, and which one is best."""
