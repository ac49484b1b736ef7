"""The table of methods: a method file registers itself, and every other part finds it here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from .adapter import Adapter
from .config import PeftConfig, add_method, discover_methods, known_method
from .errors import ConfigError


@dataclass(frozen=True)
class Method:
    """One adapter method: its name in files, its config class, its adapter class and the variants that flags choose."""

    name: str
    config: type[PeftConfig]
    adapter: type[Adapter]


_variants: dict[str, dict[str, type[Adapter]]] = {}  # {method: {config field: adapter class where it is set}}
_methods: dict[str, Method] = {}
_parts: dict[str, type[Adapter]] = {}  # {kind in an adapter's tree: adapter class}
A = TypeVar("A", bound=type)


def register(config: type[PeftConfig], flag: str | None = None) -> Callable[[A], A]:
    """Class decorator of an adapter class: `@register(LoraConfig)`; of a variant: `@register(LoraConfig, flag="use_dora")`.

    Raises:
        ConfigError: the configuration is not complete, its method's name is taken, or the class is not an adapter class.
    """
    if "__dataclass_fields__" not in vars(config):
        raise ConfigError(f"{config.__name__} is not a configuration yet; decorate it with @config_class")
    name = config.method
    if name is None:
        raise ConfigError(f'{config.__name__} does not name its method; add `method: ClassVar[str] = "..."`')

    def add(adapter: A) -> A:
        _check_adapter(config, adapter, taken=flag is None)
        if flag is None:
            _methods[name] = Method(name, config, adapter)
            add_method(name, config)
        else:
            _variants.setdefault(name, {})[flag] = adapter
        return adapter

    return add


def register_part(kind: str) -> Callable[[A], A]:
    """Class decorator of what a configuration may train beside the method's own adapters.

    Args:
        kind: its name in an adapter's tree, one of `attach.tree.Branch.KINDS`.
    """

    def add(adapter: A) -> A:
        _parts[kind] = adapter
        return adapter

    return add


def part_type(kind: str) -> Any:
    """The adapter class of what an adapter's tree holds as `kind`."""
    discover_methods()
    return _parts[kind]


def _check_adapter(config: type[PeftConfig], adapter: type, taken: bool) -> None:
    if not issubclass(adapter, Adapter):
        raise ConfigError(
            f"{adapter.__name__} is not an adapter class; derive it from LinearAdapter, SublayerAdapter or PromptAdapter"
        )
    if not config.__module__.startswith(f"{__package__}.methods."):
        discover_methods()  # a method from outside may come first, and must not take a name of these
    known = _methods.get(str(config.method))
    if taken and known is not None and _full_name(known.adapter) != _full_name(adapter):
        raise ConfigError(f'"{config.method}" is already the name of {_full_name(known.adapter)}; choose another')


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def all_methods() -> dict[str, Method]:
    """Every method, by its name in files, in alphabetical order."""
    discover_methods()
    return dict(sorted(_methods.items()))


def adapter_type(config: PeftConfig) -> Any:
    """The adapter class that `config` asks for: its method's, or the variant whose flag is set.

    Raises:
        ConfigError: the flags of several variants are set.
    """
    method = method_named(config.peft_type)
    chosen = {flag: variant for flag, variant in _variants.get(method.name, {}).items() if getattr(config, flag)}
    if len(chosen) > 1:
        raise ConfigError(f"{' and '.join(chosen)} cannot be combined; choose one")
    return next(iter(chosen.values()), method.adapter)


def method_named(name: object) -> Method:
    """The method that files call `name`; an error lists the known ones."""
    return _methods[known_method(name)]
