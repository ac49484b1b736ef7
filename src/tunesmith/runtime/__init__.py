"""One call of a handle."""
