"""The table of methods: a method file registers itself, and every other part finds it here."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, TypeVar

from .errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from .config import PeftConfig
    from .contracts import Adapter


@dataclass(frozen=True)
class Method:
    """One adapter method: its name in files, its config class and its adapter class."""

    name: str
    config: type[PeftConfig]
    adapter: type[Adapter]


_methods: dict[str, Method] = {}
A = TypeVar("A", bound=type)


def register(config: type[PeftConfig]) -> Callable[[A], A]:
    """Class decorator of an adapter class: `@register(LoraConfig)`."""

    def add(adapter: A) -> A:
        assert config.method is not None, f"{config.__name__} names no method"
        _methods[config.method] = Method(config.method, config, adapter)
        return adapter

    return add


@cache
def _import_methods() -> None:
    from . import methods

    for module in pkgutil.iter_modules(methods.__path__):
        importlib.import_module(f"{methods.__name__}.{module.name}")


def all_methods() -> dict[str, Method]:
    """Every method, by its name in files, in alphabetical order."""
    _import_methods()
    return dict(sorted(_methods.items()))


def method_named(name: object) -> Method:
    """The method that files call `name`; an error lists the known ones."""
    key = str(getattr(name, "value", name))
    known = all_methods()
    if key not in known:
        raise ConfigError(
            f'peft_type "{key}" is not known to this version of Tunesmith; known: {", ".join(known)}' + did_you_mean(key, known)
        )
    return known[key]
