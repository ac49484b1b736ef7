"""Which configuration belongs to which method; a method's file is found by name and registers itself."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from typing import Any

from ..errors import ConfigError, did_you_mean

_by_method: dict[str, type[Any]] = {}  # by the method's name in files; `registry.register` fills it


def add_method(name: str, config: type[Any]) -> None:
    """Files whose `peft_type` is `name` are read as this configuration from now on."""
    _by_method[name] = config


@functools.cache
def discover_methods() -> None:
    """Import every file of `methods/`, each of which registers its method."""
    methods = importlib.import_module("tunesmith.methods")
    for module in pkgutil.iter_modules(methods.__path__):
        importlib.import_module(f"{methods.__name__}.{module.name}")


def known_method(name: object) -> str:
    """The name of a method as files spell it.

    Raises:
        ConfigError: no method of that name is registered; lists those that are.
    """
    discover_methods()
    key = str(getattr(name, "value", name))
    if key not in _by_method:
        raise ConfigError(
            f'peft_type "{key}" is not known to this version of Tunesmith; known: {", ".join(sorted(_by_method))}'
            + did_you_mean(key, sorted(_by_method))
            + "; if it is a method of your own, import the module that registers it first"
        )
    return key


def config_type(name: object) -> type[Any]:
    """The configuration of the method that files call `name`.

    Raises:
        ConfigError: no method of that name is registered.
    """
    return _by_method[known_method(name)]
