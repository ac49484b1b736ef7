"""Fused operations. Each has a plain reference (`reference.py`) that defines it, tests it and replaces it where needed."""
