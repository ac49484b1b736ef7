"""`tunesmith doctor`: this machine, and what will be fast or slow on it."""

from __future__ import annotations

from .output import console


def doctor() -> None:
    """Report what runs fast or slow on this machine, and why. Lists its hardware and the installed versions.

    \b
    Example:
      tunesmith doctor
    """
    from ..jobs import diagnosis

    out = console(markup=False)
    marks = {"good": "+", "slow": "-", "fact": " "}
    for finding in diagnosis.findings():
        out.print(f"{marks[finding.kind]} {finding.topic:<14}{finding.text}")
