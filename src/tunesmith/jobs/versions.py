"""Which versions of packages are installed. Imports none of them."""

from __future__ import annotations

from importlib import metadata

NOT_INSTALLED = "not installed"


def version_of(package: str) -> str:
    """A package's version, or `not installed`."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return NOT_INSTALLED
