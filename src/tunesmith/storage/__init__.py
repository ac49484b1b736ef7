"""Files: folders written whole or not at all, and the hub."""
