"""Adapters to files and back; the only place that knows the ecosystem's file and tensor names."""
