"""`tunesmith doctor`: this machine, and what will be fast or slow on it."""

from __future__ import annotations


def doctor() -> None:
    """Say what this machine has, which versions are installed, and what will be fast or slow and why.

    \b
    Example:
      tunesmith doctor
    """
    from rich.console import Console

    from ..jobs import diagnosis

    console = Console(highlight=False, soft_wrap=True, markup=False)
    marks = {"good": "+", "slow": "-", "fact": " "}
    for finding in diagnosis.findings():
        console.print(f"{marks[finding.kind]} {finding.topic:<14}{finding.text}")
