"""Paths of modules, such as `model.layers.0.self_attn.q_proj`: what names them, and what lies inside what."""

from __future__ import annotations

import re
from collections.abc import Collection


def ends_with(path: str, name: str) -> bool:
    """Whether `name` is the whole path or an ending of it at a dot."""
    return path == name or path.endswith(f".{name}")


def is_named(path: str, wanted: Collection[str] | str) -> bool:
    """Whether `wanted` names the path: a regular expression matches all of it, a name is an ending of it."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, path) is not None
    return any(ends_with(path, name) for name in wanted)


def matches(path: str, pattern: str) -> bool:
    """Whether a regular expression matches an ending of the path at a dot."""
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def is_inside(path: str, ancestor: str) -> bool:
    """Whether the module at `path` is the one at `ancestor` or lies in it."""
    return path == ancestor or path.startswith(f"{ancestor}.")
