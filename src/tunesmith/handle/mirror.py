"""Handle classes made to order: one per task class and base class.

The ecosystem reads class data (`_no_split_modules`, `supports_gradient_checkpointing`, ...), the signature of `forward`
and `isinstance(model, PreTrainedModel)`. A made-to-order handle class answers all of them as its base would: everything
that `PreTrainedModel` defines and the handle does not is passed on to the base model.
"""

from __future__ import annotations

import functools
import inspect
import types
from functools import cache
from typing import Any

from torch import nn

from ..seen_as import SeenAs
from .base_methods import BaseMethods


class Mirrored:
    """A class attribute whose value, on the class and on instances, is the base's."""

    def __init__(self, name: str, class_value: Any) -> None:
        self.name = name
        self.class_value = class_value

    def __get__(self, handle: Any, owner: type) -> Any:
        return self.class_value if handle is None else getattr(handle._root(), self.name)

    def __set__(self, handle: Any, value: Any) -> None:
        setattr(handle._root(), self.name, value)


def handle_class(task_class: Any, base_class: Any) -> Any:
    """The class of handles of `task_class` on bases of `base_class`; it has the task class's name."""
    return _made(task_class, base_class)


@cache
def _made(task_class: Any, base_class: Any) -> Any:
    from transformers import PreTrainedModel

    namespace: dict[str, Any] = {
        "__class__": SeenAs("PeftModel"),
        "__module__": task_class.__module__,
        "__qualname__": task_class.__qualname__,
        "__doc__": task_class.__doc__,
        "task_class": task_class,
        "base_class": base_class,
        "forward": _forward_like(task_class, base_class),
    }
    bases: tuple[type, ...] = (task_class,)
    if issubclass(base_class, PreTrainedModel):
        bases = (task_class, PreTrainedModel)
        own = {name for cls in task_class.__mro__ if cls is not object for name in vars(cls)}
        for name in _inherited_names(PreTrainedModel) - own:
            namespace[name] = _passed_on(name, inspect.getattr_static(PreTrainedModel, name), base_class)
        namespace["config"] = Mirrored("config", getattr(base_class, "config", None))
        namespace["generation_config"] = Mirrored("generation_config", None)
        namespace["_hf_peft_config_loaded"] = True  # passes the Trainer's gate for quantised bases
    return type(task_class.__name__, bases, namespace)


def _inherited_names(pretrained: type) -> set[str]:
    """What a PreTrainedModel has beyond an nn.Module, dunder names aside."""
    names = {name for cls in pretrained.__mro__ if cls not in nn.Module.__mro__ for name in vars(cls)}
    return {name for name in names if not name.startswith("__") and not hasattr(nn.Module, name)}


def _passed_on(name: str, found: Any, base_class: type) -> Any:
    if isinstance(found, (classmethod, staticmethod)):
        return staticmethod(getattr(base_class, name))
    if inspect.isfunction(found):

        @functools.wraps(found)
        def method(self: BaseMethods, *args: Any, **kwargs: Any) -> Any:
            return self._call_base(name, *args, **kwargs)

        return method
    return Mirrored(name, getattr(base_class, name, None))


def _forward_like(task_class: type[BaseMethods], base_class: Any) -> Any:
    """The task class's own forward under the base's signature, in which transformers reads the names of labels."""
    own = task_class.forward
    forward = types.FunctionType(own.__code__, own.__globals__, own.__name__, own.__defaults__, own.__closure__)
    forward.__kwdefaults__ = own.__kwdefaults__
    forward.__signature__ = inspect.signature(base_class.forward)  # type: ignore[attr-defined]
    forward.__doc__ = base_class.forward.__doc__
    return forward
