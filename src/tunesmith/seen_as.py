"""What `isinstance(x, peft.PeftModel)` and `isinstance(x, peft.PeftConfig)` answer about our objects once `peft` is imported.

`isinstance` asks an object's `__class__` where its type says no. So this attribute answers, while `peft` is in memory, a class
that is the object's own and, last in its order of lookup, peft's of the same name: everything is still found where it was, and
nothing of peft's runs. We never import peft; without it, `__class__` is the type.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

# Called with the module `peft` when it is first asked for; `compat/` adds what makes a yes hold.
PREPARE: list[Callable[[Any], None]] = []


class SeenAs:
    """The attribute `__class__` of objects that stand for those of a class of peft.

    Args:
        name: of the class in peft that all of them are; a subclass of it that has an object's own name is preferred.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, found: Any, owner: type) -> Any:
        theirs = getattr(sys.modules.get("peft"), self.name, None)  # None while it is being imported, too
        return owner if theirs is None else _prepared(theirs, owner)

    def __set__(self, found: Any, cls: type) -> None:
        object.__dict__["__class__"].__set__(found, cls)


@functools.cache
def _prepare(peft: Any) -> None:
    for prepare in PREPARE:
        prepare(peft)


@functools.cache
def _prepared(theirs: type, ours: type) -> type:
    peft = sys.modules["peft"]
    _prepare(peft)
    named = getattr(peft, ours.__name__, None)
    return _both(ours, named if isinstance(named, type) and issubclass(named, theirs) else theirs)


def _both(ours: Any, theirs: type) -> type:
    """A class that finds everything in `ours` first. (Inheriting from both has no consistent order.)"""
    if issubclass(ours, theirs):
        return ours

    class Both(type(ours)):  # type: ignore[misc]
        def mro(cls) -> list[type]:
            own = super().mro()[:-1]
            return [*own, *(other for other in theirs.__mro__ if other not in own)]

    return Both(
        ours.__name__, (ours,), {"__module__": ours.__module__, "__qualname__": ours.__qualname__, "__doc__": ours.__doc__}
    )
