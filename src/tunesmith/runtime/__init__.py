"""One call of a base: what goes into it and what it keeps."""
