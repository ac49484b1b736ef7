"""Files: folders written atomically, and the Hub."""
