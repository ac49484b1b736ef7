"""The embedded base model and demo data, and the names they go by."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
EMBEDDED = {"sprout": FOLDER / "sprout"}


def resolve(name_or_path: str) -> str:
    """The folder of an embedded model where its name is given, else the argument: wherever a model name is accepted."""
    folder = EMBEDDED.get(str(name_or_path))
    return str(folder) if folder else str(name_or_path)


def public_name(name_or_path: str | None) -> str | None:
    """The inverse of `resolve`, so that files never hold a path of this machine's site-packages."""
    for name, folder in EMBEDDED.items():
        if name_or_path and Path(name_or_path) == folder:
            return name
    return name_or_path
