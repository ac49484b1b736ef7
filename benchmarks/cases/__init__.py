"""The cases. Each has `VARIANTS`, `run(variant, ...)` (called in a fresh process) and `report(records)`."""
