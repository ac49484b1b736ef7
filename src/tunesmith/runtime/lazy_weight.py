"""A weight that is computed when something computes with it, and until then only looks like one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..errors import UsageError


class LazyWeight(Tensor):
    """Looks like the parameter `own` of a base, and is what `compute()` gives as soon as something computes with it.

    Models look at weights for their type or device alone (T5 does, at every layer), which must not cost a merge. It has no
    memory of its own, so code that reads memory past torch fails rather than reading the base's.
    """

    own: Tensor
    compute: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, own: Tensor, compute: Callable[[], Tensor]) -> LazyWeight:
        make: Any = Tensor._make_wrapper_subclass
        made: LazyWeight = make(cls, own.shape, strides=own.stride(), dtype=own.dtype, device=own.device)
        made.own, made.compute = own, compute
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in LOOKS:
            return func(*(value.own if isinstance(value, LazyWeight) else value for value in args), **(kwargs or {}))
        if func in _DETACHES:
            weight = args[0]
            return LazyWeight(weight.own, lambda: weight.compute().detach())
        if args and isinstance(args[0], LazyWeight) and _writes(func):
            raise UsageError(
                f"{func.__name__} would write into a weight under adapters, and the base is never changed; "
                "merge the adapters first, or leave the module out of target_modules and modules_to_save"
            )
        return func(*_computed(args), **_computed(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise UsageError(
            f"{func} was reached with a weight under adapters, past torch's own functions; leave the module that holds it out "
            "of target_modules and modules_to_save"
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)  # what packages keep on their parameters


class Used(TorchFunctionMode):
    """Notes which of some parameters are computed with, whoever holds them.

    Args:
        parameters: `{parameter: name}`.
    """

    def __init__(self, parameters: dict[Tensor, str]) -> None:
        super().__init__()
        self.names = {id(parameter): name for parameter, name in parameters.items()}
        self.found: set[tuple[str, bool]] = set()  # names, and whether rows were looked up

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in LOOKS:
            names = [self.names[id(value)] for value in tree_leaves((args, kwargs)) if id(value) in self.names]
            self.found.update((name, func in (F.embedding, torch.embedding)) for name in names)
        return func(*args, **kwargs)


def _computed(value: Any) -> Any:
    """Nested arguments with each lazy weight computed."""
    if isinstance(value, LazyWeight):
        return value.compute()
    if type(value) in (tuple, list):
        return type(value)(map(_computed, value))
    if type(value) is dict:
        return {name: _computed(each) for name, each in value.items()}
    return value


def _writes(func: Any) -> bool:
    """Whether a function of torch changes its first argument."""
    name = getattr(func, "__name__", "")
    return name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))


_OPERATORS = ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
_IN_PLACE = {"__set__", "__setitem__", *(f"__i{name}__" for name in _OPERATORS)}
_PROPERTIES = ("shape", "dtype", "device", "layout", "ndim", "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized",
               "is_nested", "is_mps", "is_xpu", "itemsize", "nbytes")  # fmt: skip
_METHODS = ("size", "dim", "ndimension", "numel", "nelement", "element_size", "stride", "is_contiguous", "is_floating_point",
            "is_complex", "__len__", "__hash__")  # fmt: skip
_DETACHES = {
    vars(torch._C.TensorBase)["data"].__get__,
    Tensor.detach,
    torch.detach,
}  # what is written into these is written into the weight
LOOKS = {
    *(getattr(Tensor, name).__get__ for name in _PROPERTIES),
    *(getattr(Tensor, name) for name in _METHODS),
    torch.numel,
    torch.is_floating_point,
    torch.is_complex,
}
