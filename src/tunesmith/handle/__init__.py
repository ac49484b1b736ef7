"""The parts of a handle."""
