"""Saving and loading adapters; the only place that knows the ecosystem's tensor names."""
