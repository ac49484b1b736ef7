"""Adapters into weights, and back out."""
