"""Benchmarks: one case per file in `cases/`, one harness; tables in the docs are generated from their results."""
