"""Data files to batches."""
