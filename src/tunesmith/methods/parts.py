"""What several methods share: values per module, and checks of configurations and modules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

from ..bases.view import BaseView
from ..config import Settings
from ..paths import matches

E = TypeVar("E", bound=Enum)


@dataclass(frozen=True)
class RankSettings(Settings):
    """Of a low-rank change: its rank, and what it is multiplied with."""

    r: int
    scale: float


def by_pattern(pattern: dict[str, Any] | None, path: str, default: Any) -> Any:
    """The value of the first key that matches the end of `path` at a dot, as a regular expression."""
    return next((value for key, value in (pattern or {}).items() if matches(path, key)), default)


def as_choice(kind: type[E], value: E | str) -> E | str:
    """`value` as a member of an enumeration, where it is the name of one."""
    return kind(value) if value in [choice.value for choice in kind] else value


def with_pattern(name: str, value: Any, pattern: dict[str, Any] | None, pattern_name: str) -> dict[str, Any]:
    """`{how the user spells it: value}` of a field and of the pattern that overrides it."""
    return {name: value, **{f'{pattern_name}["{key}"]': each for key, each in (pattern or {}).items()}}


def wrong_bias(bias: str, own: str) -> Iterator[str]:
    if bias not in ("none", "all", own):
        yield f'bias={bias!r} must be "none", "all" or "{own}"'


def not_linear(base: BaseView, method: str) -> str | None:
    """Why `method`, which adapts linear modules only, cannot sit on this one; None where it can."""
    if base.tokens_in or len(base.shape) != 2:
        return f"{method} adapts linear modules only; leave it out of target_modules"
    return None


def not_linear_or_convolution(base: BaseView, method: str, groups: bool = True) -> str | None:
    """Why `method`, which maps the weights of linear modules and convolutions, cannot sit on this one."""
    if base.tokens_in:
        return f"{method} adapts linear modules and convolutions, not embeddings; leave it out of target_modules"
    if not groups and getattr(base.module, "groups", 1) > 1:
        return f"{method} cannot map the input channels of a grouped convolution; leave it out of target_modules"
    return None
