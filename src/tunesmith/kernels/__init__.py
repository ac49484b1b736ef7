"""Fused operations, each with a plain twin in `reference.py` that defines it, tests it and stands in for it."""
