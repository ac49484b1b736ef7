"""The view an adapter gets of its base module, and the table from module types to views.

An adapter never touches the module. It calls the view (`base(x)`) or asks it for parts: the product without bias, the
dense weight in the orientation `(out, in)`, the bias. A storage format (4-bit, 8-bit) is one more view type.

Types from packages that may not be installed are listed in the table by their full names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .stored_tensors import FLOAT8, computing_type, shape_of, whole


class BaseView:
    """One linear map `y = W x + b`, seen independently of how the module stores it.

    Low-rank factors `A` and `B` of a change of `W` have the shapes that `low_rank_shapes(r)` gives;
    `up(down(x, A), B)` applies the change and `compose(A, B)` is the change itself.
    """

    tokens_in: ClassVar[bool] = False  # the input holds token ids, so it cannot be dropped out or scaled
    plain_forwards: ClassVar[tuple[Any, ...]] = ()  # of classes that compute the product of their weight and the input
    plain_types: ClassVar[tuple[type, ...]] = ()  # subclasses of these may store or compute something else
    names: ClassVar[tuple[str, str]] = ("weight", "bias")  # of the module's parameters
    computes: ClassVar[bool] = False  # under a handle the view's call replaces the class's forward, adapters or not

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The module's own output, bit for bit."""
        y: Tensor = class_forward(self.module)(x, *args, **kwargs)
        if isinstance(y, tuple):
            raise UsageError(
                f"{type(self.module).__name__} answers a tuple, so no change can be added; leave it out of target_modules"
            )
        return y

    @property
    def is_matrix(self) -> bool:
        """Whether the weight is `(out, in)` and the input holds `in` numbers: no lookup, no convolution."""
        return not self.tokens_in and len(self.shape) == 2

    @property
    def bias(self) -> Tensor | None:
        return own_parameter(self.module, self.names[1])

    @property
    def output_scale(self) -> Any:
        """Factor on the module's output (scaled word embeddings have one)."""
        return 1

    def weight(self) -> Tensor:
        """The dense weight, `(out, in, ...)`."""
        weight: Tensor = own_parameter(self.module, self.names[0])
        elsewhere = weight.dtype in FLOAT8 or hasattr(weight, "ds_shape")
        return whole(weight).to(self.dtype) if elsewhere else weight

    def weight_as(self, dtype: torch.dtype) -> Tensor:
        """The dense weight in this dtype; a quantised one is decoded to it directly, without rounding in between."""
        return self.weight().to(dtype)

    @property
    def shape(self) -> torch.Size:
        """The shape of `weight()`."""
        return shape_of(self.module.weight)

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point dtype that the module computes in."""
        return computing_type(self.module.weight.dtype)

    def storage_fault(self) -> str | None:
        """Why no dense weight can be read from what the module stores; None if one can."""
        weight, values = self.module.weight, dict(self.module.named_parameters()) | dict(self.module.named_buffers())
        if not weight.is_floating_point():
            return f"its weight is stored as {weight.dtype}, which this version cannot adapt"
        others = sorted(values.keys() - {"weight", "bias"})
        if weight.dtype in FLOAT8 and others:
            return (
                f"its weight is stored as {weight.dtype} with {', '.join(others)} beside it, a form that this version cannot "
                "decode; load the base dequantised"
            )
        return None

    @property
    def is_plain(self) -> bool:
        """Whether the module computes `x W^T + bias`, and nothing else."""
        return type(self.module) in self.plain_types

    def operand(self, dtype: torch.dtype) -> Any:
        """The weight as `kernels.lora_linear` takes it for inputs of this dtype: a tensor, or an object that decodes it."""
        return self.weight()

    def stored(self, weight: Tensor) -> Tensor:
        """`weight` as the module stores it: the inverse orientation of `weight()`."""
        return weight

    def parameter(self, weight: Tensor) -> nn.Parameter:
        """A frozen parameter for the module that holds `weight`, rounded to the module's storage format."""
        return nn.Parameter(self.stored(weight).to(self.module.weight.dtype), requires_grad=False)

    def matmul(self, x: Tensor) -> Tensor:
        """`W x` without the bias."""
        return self.product(x, self.weight())

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """`x` through another weight of the module's own shape, without a bias."""
        raise NotImplementedError

    def low_rank_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B for rank `r`."""
        raise NotImplementedError

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        """`x` through A: the module's kind of product with A in place of the weight."""
        raise NotImplementedError

    def up(self, h: Tensor, b: Tensor) -> Tensor:
        """`h`, of rank width, through B."""
        raise NotImplementedError

    def compose(self, a: Tensor, b: Tensor) -> Tensor:
        """The change of `weight()` that A and B stand for."""
        return b @ a

    def per_output(self, values: Tensor) -> Tensor:
        """One value per output, in a shape that broadcasts over the module's output."""
        return values

    def compose_fault(self) -> str | None:
        """Why `compose` is not defined for this module; None if it is."""
        return None


def own_parameter(module: nn.Module, name: str) -> Any:
    """The module's own parameter, which `module.name` need not be in a handle's call (`runtime/reads.py`)."""
    own = module._parameters
    return own.get(name) if name in own else getattr(module, name, None)


def class_forward(module: nn.Module) -> Callable[..., Any]:
    """The class's forward bound to `module`: what the module computes with no site in its `__dict__`."""
    return type(module).forward.__get__(module)


def module_view(module: nn.Module, parameters: Mapping[str, Tensor | None]) -> nn.Module:
    """A shallow copy of a module, in which these parameters are replaced."""
    view = object.__new__(type(module))  # not copy.copy, which torch.compile cannot trace
    view.__dict__.update(module.__dict__, _parameters={**module._parameters, **parameters})
    return view


def plain_forward(module: nn.Module) -> Callable[..., Any]:
    """What the module computes under a handle when no adapter acts on it."""
    own = computing_view(module)
    return own(module) if own else class_forward(module)


def computing_view(module: nn.Module) -> type[BaseView] | None:
    """The module's view, if it computes in place of the class's forward."""
    found = view_type(module)
    return found if found is not None and found.computes else None


_views: dict[type[nn.Module] | str, type[BaseView]] = {}


def register_view(*modules: type[nn.Module] | str) -> Callable[[type[BaseView]], type[BaseView]]:
    """Class decorator: these module types, and their subclasses, are seen through the decorated view.

    A type from a package that may not be installed is given by its full name, "package.module.Class".
    """

    def add(view: type[BaseView]) -> type[BaseView]:
        _views.update(dict.fromkeys(modules, view))
        return view

    return add


def view_type(module: nn.Module) -> type[BaseView] | None:
    """The view type for `module`, found along its class's bases; None if no adapter can be attached."""
    for cls in type(module).__mro__:
        found = _views.get(cls) or _views.get(f"{cls.__module__}.{cls.__qualname__}")
        if found is not None:
            return found
    return None


def view_of(module: nn.Module) -> BaseView:
    """The view of `module`, which must have one."""
    found = view_type(module)
    assert found is not None, f"no view for {type(module).__name__}"
    return found(module)


def compute_dtype(module: nn.Module) -> torch.dtype:
    """The floating-point dtype of the module's weight; of a block, of its first one."""
    if computing_view(module) is not None:
        return view_of(module).dtype
    weight = getattr(module, "weight", None)
    if weight is None:
        weight = next((p for p in module.parameters() if p.is_floating_point()), None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return torch.float32
    return computing_type(weight.dtype)


def execution_device(module: nn.Module) -> torch.device:
    """Where the module computes: the hook's device when its weights are offloaded, else its weights' own.

    A block computes where its first module with weights does.
    """
    for inner in module.modules():
        device = getattr(getattr(inner, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
        first = next(inner.parameters(recurse=False), None)
        if first is not None:
            return first.device
    return torch.device("cpu")
