"""The insertion points: a method implements one of these small classes and nothing else.

Whether an adapter is active, merged, disabled or mixed with others is decided elsewhere, once. An adapter only says
what it computes (`forward`), what it does to the weights (`merge`) and which tensors it owns (its parameters).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .bases.quantised import dense_copy
from .bases.view import BaseView, compute_dtype, plain_forward, view_of, view_type
from .config import PromptConfig
from .errors import UsageError
from .frame import Mixture


class Adapter(nn.Module):
    """What every adapter is: parameters of its own, beside the base."""

    mergeable: ClassVar[bool] = True
    scheduled: ClassVar[bool] = False  # the method has a penalty and acts after optimiser steps
    shared: nn.Module | None = None  # what `shared_tensors` made; belongs to the tree, not to this module

    @classmethod
    def fault(cls, base: Any, config: Any, settings: dict[str, Any]) -> str | None:
        """Why this module cannot carry the adapter, checked before anything changes; None where it can."""
        return None

    @classmethod
    def shared_tensors(cls, config: Any, modules: dict[str, nn.Module]) -> nn.Module | None:
        """Tensors that the adapters of all these modules (by path) use together, made once per adapter."""
        return None

    @classmethod
    def usual_targets(cls, modules: dict[str, nn.Module]) -> set[str]:
        """Paths to adapt where neither the user nor the architecture names any; for methods that find them on the base."""
        raise NotImplementedError

    @classmethod
    def penalty(cls, adapters: dict[str, Any], config: Any) -> Tensor:
        """What training adds to the loss, from one adapter's modules (by path); for `scheduled` methods."""
        raise NotImplementedError

    @classmethod
    def observe_step(cls, adapters: dict[str, Any], config: Any, step: int) -> None:
        """Look at gradients and parameters right after optimiser step `step` (from 1); for `scheduled` methods."""
        raise NotImplementedError

    @classmethod
    def allocate(cls, adapters: dict[str, Any], config: Any, step: int) -> None:
        """Change the adapters as step `step` of the schedule asks; called again, it replaces what the first call did."""
        raise NotImplementedError

    @classmethod
    def saved(cls, name: str, value: Tensor, config: Any) -> Tensor:
        """What is written of the tensor that files call `name`."""
        return value

    def private_values(self) -> list[str]:
        """What of its module this adapter has a value of its own for; no other adapter can act on that beside it."""
        return []

    def derive(self, base: Any) -> None:
        """Compute frozen tensors that follow from the base; called when weights are about to be loaded, too."""

    def reset_parameters(self, base: Any) -> None:
        """Draw the initial values; not called when weights are about to be loaded."""


class LinearAdapter(Adapter):
    """An adapter on one module that is a linear map (`bases/` says which modules are).

    A base with an adapter is again a base (`Adapted`), so several active adapters fold, and the merged weight equals
    the folded computation.
    """

    def __init__(self, base: BaseView, config: Any, settings: dict[str, Any]) -> None:
        super().__init__()

    def forward(self, x: Tensor, base: BaseView, *args: Any, **kwargs: Any) -> Tensor:
        """The adapted output for the input `x` of the module that `base` views."""
        raise NotImplementedError

    def merge(self, weight: Tensor, bias: Tensor | None, base: BaseView) -> tuple[Tensor, Tensor | None]:
        """The dense weight `(out, in, ...)` and bias that compute what `forward` computes in eval mode."""
        raise NotImplementedError

    def merge_fault(self, base: BaseView) -> str | None:
        """Why `merge` cannot work on this module, checked before anything changes; None where it can."""
        return None


class Adapted(BaseView):
    """A view with an adapter on it, which is a view again: what the next adapter sees as its base."""

    def __init__(self, adapter: LinearAdapter, base: BaseView) -> None:
        super().__init__(base.module)
        self.adapter = adapter
        self.base = base
        self.tokens_in = base.tokens_in  # type: ignore[misc]

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.adapter(x, self.base, *args, **kwargs)

    def weight(self) -> Tensor:
        return self.adapter.merge(self.base.weight(), self.base.bias, self.base)[0]

    @property
    def bias(self) -> Tensor | None:
        return self.adapter.merge(self.base.weight(), self.base.bias, self.base)[1]

    @property
    def shape(self) -> torch.Size:
        return self.base.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @property
    def output_scale(self) -> Any:
        return self.base.output_scale

    def matmul(self, x: Tensor) -> Tensor:
        y, bias = self(x), self.bias
        return y if bias is None else y - bias

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.base.product(x, weight)

    def stored(self, weight: Tensor) -> Tensor:
        return self.base.stored(weight)

    def low_rank_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.base.low_rank_shapes(r)

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        return self.base.down(x, a)

    def up(self, h: Tensor, b: Tensor) -> Tensor:
        return self.base.up(h, b)

    def compose(self, a: Tensor, b: Tensor) -> Tensor:
        return self.base.compose(a, b)

    def per_output(self, values: Tensor) -> Tensor:
        return self.base.per_output(values)


class SublayerAdapter(Adapter):
    """An adapter on a whole block of any type: changes what the block computed (bottleneck adapters, adaption prompts)."""

    mergeable = False

    def __init__(self, module: nn.Module, config: Any, settings: dict[str, Any]) -> None:
        super().__init__()

    def forward(self, hidden: Tensor, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """The adapted output.

        Args:
            hidden: the block's output; of a tuple, its first part.
            module: the block itself.
            args, kwargs: what the block was called with; in a mixed batch, these rows' share of each tensor.
        """
        raise NotImplementedError


class PromptAdapter(Adapter):
    """An adapter at the model's entrance: virtual tokens before the input, or keys and values before every layer's own.

    It has a finished form, one parameter `embedding`, which is what files hold; while training, an `encoder` may stand
    in its place that computes it. `adapter()` gives virtual tokens as `(tokens * submodules, dim)`, the order of
    submodules being encoder, decoder; or one set of them per row, `(rows, tokens * submodules, dim)`.

    Args:
        finished: build the finished form: nothing is trained, or the encoder is not there any more.
    """

    mergeable = False
    by_task: ClassVar[bool] = False  # called with `task_ids`, one for each row
    in_cache: ClassVar[bool] = False  # acts as keys and values of past tokens (prefix.py), not as embeddings

    @classmethod
    def prepare(cls, config: PromptConfig, model: nn.Module) -> None:
        """Fill the config's fields that follow from the model; raises where they contradict it."""

    def __init__(self, config: Any, model: nn.Module, finished: bool = False) -> None:
        super().__init__()
        self.config = config
        self.encoder: Any = None if finished else self.make_encoder(config)
        self.embedding: Any = nn.Parameter(torch.empty(self.shape(config))) if self.encoder is None else None

    @staticmethod
    def shape(config: Any) -> tuple[int, int]:
        """Of the finished form."""
        return config.num_virtual_tokens * config.num_transformer_submodules, config.token_dim

    @staticmethod
    def make_encoder(config: Any) -> nn.Module | None:
        """A module that, called without arguments, computes the finished form; None where that is trained itself."""
        return None

    def values(self) -> Tensor:
        """The finished form."""
        return self.embedding if self.encoder is None else self.encoder()

    def forward(self, *args: Any) -> Tensor:
        return self.values()


class ParameterAdapter(Adapter):
    """Private values for single parameters of a module of any type, swapped in for the call.

    The module is called as a shallow twin whose named parameters are this adapter's own, so the base's tensors are
    neither changed nor copied. Here it trains biases; it is also the room for parameters that no module call passes
    through (`target_parameters`, `nn.MultiheadAttention`).
    """

    def __init__(self, module: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.names = names
        for name in names:
            self.register_parameter(name, nn.Parameter(getattr(module, name).detach().clone()))

    def private_values(self) -> list[str]:
        return list(self._parameters)

    def forward(self, module: nn.Module) -> nn.Module:
        """A shallow twin of `module` that holds the private values."""
        return shallow_twin(module, self.replaced(module))

    def replaced(self, module: nn.Module) -> dict[str, Tensor]:
        """`{parameter: value}` that acts in place of the module's own, and that merging puts into it."""
        return {name: value.to(getattr(module, name).dtype) for name, value in self.named_parameters()}


def shallow_twin(module: nn.Module, parameters: Mapping[str, Tensor | None]) -> nn.Module:
    """A module of the same class that holds the same things, but for these parameters."""
    twin = object.__new__(type(module))  # not copy.copy, which torch.compile cannot trace
    twin.__dict__.update(module.__dict__, _parameters={**module._parameters, **parameters})
    return twin


class ModuleCopy(Adapter):
    """A private, trainable copy of a whole module, called in its place (`modules_to_save`, task heads); always dense."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = dense_copy(module).requires_grad_(True)

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def replaced(self, module: nn.Module) -> dict[str, Tensor]:
        """`{parameter or buffer: value}` that merging puts into the module."""
        return {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}


class Around:
    """What stands around a module's call beside its adapters: `around(call, *args, **kwargs)`."""

    def __call__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def by_rows(self, parts: list[Any], mixture: Mixture, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The call of a mixed batch.

        Args:
            parts: what stands here for each part of the mixture, of this object's type; None where nothing does.
        """
        raise NotImplementedError


class Twin:
    """What gives a module to be called in another's place, which holds the same things: `twin(module)`."""

    def __call__(self, module: nn.Module) -> nn.Module:
        raise NotImplementedError


def fold(module: nn.Module, adapters: tuple[Adapter | Around | Twin, ...]) -> Callable[..., Any]:
    """`module`'s forward with `adapters` on it, the first one innermost; those on its weights before those on its output."""
    for adapter in adapters:
        if isinstance(adapter, (ParameterAdapter, Twin)):
            module = adapter(module)
    call: Callable[..., Any] = view_of(module) if view_type(module) else plain_forward(module)
    for adapter in adapters:
        if isinstance(adapter, LinearAdapter):
            assert isinstance(call, BaseView), "linear adapters come before whole-module ones"
            call = Adapted(adapter, call)
    for adapter in adapters:
        if isinstance(adapter, SublayerAdapter):
            call = functools.partial(_adapted_block, adapter, module, call)
        elif isinstance(adapter, (ModuleCopy, Around)):
            call = functools.partial(adapter, call)
    return call


def _adapted_block(adapter: SublayerAdapter, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    result = call(*args, **kwargs)
    if isinstance(result, Tensor):
        return adapter(result, module, args, kwargs)
    if not isinstance(result, tuple):
        raise UsageError(
            f"{type(module).__name__} returned a {type(result).__name__}; {type(adapter).__name__} needs a tensor, alone or "
            "first in a tuple: leave this module out of target_modules"
        )
    return (adapter(result[0], module, args, kwargs), *result[1:])


def adapter_dtype(module: nn.Module, full_precision: bool) -> torch.dtype:
    """fp32 masters beside a 16-bit base unless told otherwise, else the base's own type."""
    return master_dtype(compute_dtype(module), full_precision)


def master_dtype(dtype: torch.dtype, full_precision: bool) -> torch.dtype:
    return torch.float32 if full_precision and dtype in (torch.float16, torch.bfloat16) else dtype
