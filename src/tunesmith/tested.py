"""The range of releases of its dependencies that tunesmith is tested with (`make test-matrix`)."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from importlib import metadata

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tested:
    """The oldest and the newest tested release of a package. Patch releases are not told apart."""

    package: str
    oldest: str
    newest: str

    def __str__(self) -> str:
        return f"{self.package} {self.oldest}" + (f" to {self.newest}" if self.newest != self.oldest else "")

    def fault(self, installed: str) -> str | None:
        """Why an installed release may not work; None if it is in the range."""
        found = _minor(installed)
        if found > _minor(self.newest):
            return (
                f"{self.package} {installed} is newer than {self.newest}, the newest release that this version of tunesmith is "
                f'tested with; if something fails, update tunesmith or pip install "{self.package}=={self.newest}"'
            )
        if found < _minor(self.oldest):
            return (
                f"{self.package} {installed} is older than {self.oldest}, the oldest release that this version of tunesmith "
                f'works with; pip install "{self.package}>={self.oldest}"'
            )
        return None


TRANSFORMERS = Tested("transformers", "5.9.0", "5.24.0")
TORCH = Tested("torch", "2.13.0", "2.13.0")


@functools.cache
def warn_once() -> None:
    """Warn, once per process, if transformers is outside the tested range."""
    fault = installed_fault()
    if fault:
        logger.warning(fault)


def installed_fault() -> str | None:
    """Why the installed transformers may not work; None if it is in the tested range."""
    installed = _installed_release()
    return None if installed is None else TRANSFORMERS.fault(installed)


@functools.cache
def _installed_release() -> str | None:
    """The installed release of transformers; None of a source tree, or where it is no number: there is nothing to compare."""
    try:
        release = metadata.version("transformers")
        _minor(release)
    except (metadata.PackageNotFoundError, ValueError):
        return None
    return release


def _minor(release: str) -> tuple[int, int]:
    """`(5, 24)` of "5.24.0" and of "5.24.0.dev0"."""
    major, minor, *_ = (*release.split("."), "0")
    return int(major), int("".join(character for character in minor if character.isdigit()) or 0)
