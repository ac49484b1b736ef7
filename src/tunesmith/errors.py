"""Errors that users see: what was found, what was expected, what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TunesmithError(Exception):
    """Base of every error Tunesmith raises on purpose."""


class ConfigError(TunesmithError, ValueError):
    """A configuration value or key is not allowed."""


class TargetError(TunesmithError, ValueError):
    """A pattern matches nothing, or matches something that cannot carry the adapter."""


class AdapterNameError(TunesmithError, ValueError):
    """An adapter's name is unknown, taken or unsafe."""


class AdapterFileError(TunesmithError, ValueError):
    """An adapter's files are missing, damaged, hostile or made for another base."""


class UsageError(TunesmithError, RuntimeError):
    """A call that is not possible in the present state."""


class DataError(TunesmithError, ValueError):
    """A data file or row cannot be used."""


class DivergedError(TunesmithError, RuntimeError):
    """A training run whose loss is not finite or runs away; `good_step` is the last step with good weights."""

    good_step: int | None = None


class OutOfMemoryError(TunesmithError, RuntimeError):
    """A training run does not fit in memory."""


class InterruptedRun(TunesmithError, RuntimeError):
    """A training run that a signal ended, with a checkpoint to resume from."""


class Unmatched(str):
    """A fault of a configuration that is none where its adapter is loaded and every tensor finds its place."""


def nearest(name: str, options: Iterable[str], count: int = 3) -> list[str]:
    """The up to `count` options most like `name`, best first."""
    return difflib.get_close_matches(name, list(dict.fromkeys(options)), n=count, cutoff=0.5)


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """`; did you mean 'x' or 'y'?`, or nothing if no option is close."""
    found = nearest(name, options)
    return f"; did you mean {' or '.join(repr(option) for option in found)}?" if found else ""


def bullet_list(lines: Iterable[str], limit: int = 20) -> str:
    """The lines as a bulleted block; after `limit` lines only a count."""
    lines = list(lines)
    shown = [f"  - {line}" for line in lines[:limit]]
    if len(lines) > limit:
        shown.append(f"  - ... and {len(lines) - limit} more")
    return "\n".join(shown)
