"""`tunesmith`: one file per verb. Nothing here imports torch before a verb runs."""

from .app import main

__all__ = ["main"]
