"""The insertion points: a method implements one of these small classes and nothing else.

Whether an adapter is active, merged, disabled or mixed with others is decided elsewhere, once. An adapter only says
what it computes (`forward`), what it does to the weights (`merge`) and which tensors it owns (its parameters).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .bases.quantised import dense_copy
from .bases.stored_tensors import is_partitioned, whole
from .bases.view import BaseView, module_view
from .config import PeftConfig, PromptConfig, Settings
from .errors import UsageError


class Adapter(nn.Module):
    """What every adapter is: parameters of its own, beside the base."""

    mergeable: ClassVar[bool] = True
    shared: nn.Module | None = None  # what `shared_tensors` made; belongs to the tree, not to this module

    @classmethod
    def fault(cls, base: Any, config: Any, settings: Any) -> str | None:
        """Why this module cannot carry the adapter, checked before anything changes; None where it can.

        Args:
            base: the module's view for a `LinearAdapter`, else the module.
            config: the method's configuration.
            settings: what `config.settings(path)` gives for this module.
        """
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
    def saved(cls, name: str, value: Tensor, config: Any) -> Tensor:
        """What is written of the tensor that files call `name`."""
        return value

    def in_file(self, beside: bool) -> dict[str, Tensor]:
        """`{name: tensor}` of what files hold of this adapter, by the names they give it after the module's path.

        Args:
            beside: the method's own adapter is at this module, too, so that the ecosystem's files wrap the module.
        """
        return self.state_dict(keep_vars=True)

    def second_names(self) -> list[str]:
        """Names by which files may hold, transposed, what this adapter uses of the one that it follows."""
        return []

    @property
    def owner(self) -> Adapter:
        """Whose tensors this adapter uses: its own, or those of the adapter that it follows."""
        owner: Adapter = self.__dict__.get("followed", self)
        return owner

    def follow(self, owner: Adapter) -> None:
        """Use the tensors of `owner`, an adapter on another module that holds the same weight."""
        self.__dict__["followed"] = owner  # it stays a node of its own in the tree

    def _replicate_for_data_parallel(self) -> Adapter:
        """torch's hook: a shallow copy for another device; it remembers of what, so that a copied handle finds its own."""
        copied: Adapter = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        copied.__dict__["original"] = self
        return copied

    def parts(self) -> Iterator[tuple[str, Adapter]]:
        """`(path, adapter)` of what this adapter changes of modules inside its own, for whoever reaches them past its own."""
        return iter(())

    def _part(self, modules: dict[str, nn.Module]) -> Adapter:
        """This adapter with these of its modules alone; they stay where they are in the tree."""
        part = copy.copy(self)
        part.__dict__["_modules"] = modules
        part.follow(self)
        return part

    def private_values(self) -> list[str]:
        """What of its module this adapter has a value of its own for; no other adapter can act on that beside it."""
        return []

    def derive(self, base: Any) -> None:
        """Compute frozen tensors that follow from the base; called when weights are about to be loaded, too."""

    def reset_parameters(self, base: Any) -> None:
        """Draw the initial values; not called when weights are about to be loaded."""


class ScheduledAdapter(Adapter):
    """An adapter of a method that adds to the loss and acts after optimiser steps, over all modules of one adapter.

    The class methods get the method's adapters by path.
    """

    @classmethod
    def penalty(cls, adapters: Mapping[str, Any], config: Any) -> Tensor:
        """What training adds to the loss."""
        raise NotImplementedError

    @classmethod
    def observe_step(cls, adapters: Mapping[str, Any], config: Any, step: int) -> None:
        """Look at gradients and parameters right after optimiser step `step` (from 1)."""
        raise NotImplementedError

    @classmethod
    def allocate(cls, adapters: Mapping[str, Any], config: Any, step: int) -> None:
        """Change the adapters as step `step` of the schedule asks; called again, it replaces what the first call did."""
        raise NotImplementedError


@dataclass(frozen=True)
class TokenSettings(Settings):
    """Which rows of an embedding train; a module that shares the embedding's weight follows the one at this path."""

    tokens: tuple[int, ...]
    follows: str | None = None


@dataclass(frozen=True)
class StoredSettings(Settings):
    """Which parameters of a module have values that come with an adapter's file.

    Args:
        follows: by parameter; None, or the path of the module whose value it shares.
        prefix: what files put in front of the parameters' names.
    """

    follows: dict[str, str | None]
    prefix: str


class LinearAdapter(Adapter):
    """An adapter on one module that is a linear map (`bases/` says which modules are).

    A base with an adapter is again a base (`Adapted`), so several active adapters fold, and the merged weight equals
    the folded computation.
    """

    def __init__(self, base: BaseView, config: PeftConfig, settings: Settings) -> None:
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


class SublayerAdapter(Adapter):
    """An adapter on a whole block of any type: changes what the block computed (bottleneck adapters, adaption prompts)."""

    mergeable = False

    def __init__(self, module: nn.Module, config: PeftConfig, settings: Settings) -> None:
        super().__init__()

    def forward(self, hidden: Tensor, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The adapted output.

        Args:
            hidden: the block's output; of a tuple, its first part.
            module: the block itself.
            args, kwargs: what the block was called with; in a mixed batch, these rows' share of each tensor.
        """
        raise NotImplementedError


class PromptAdapter(Adapter):
    """An adapter of the input: virtual tokens in front of it, or keys and values in front of every layer's own.

    It has a materialized form, one parameter `embedding`, which is what files hold; while training, an `encoder` may stand
    in its place that computes it. `adapter()` gives virtual tokens as `(tokens * submodules, dim)`, the order of
    submodules being encoder, decoder; or one set of them per row, `(rows, tokens * submodules, dim)`.

    Args:
        materialized: build the materialized form: nothing is trained, or the encoder is not there any more.
    """

    mergeable = False
    by_task: ClassVar[bool] = False  # called with `task_ids`, one for each row
    in_cache: ClassVar[bool] = False  # acts as keys and values of past tokens (prefix.py), not as embeddings

    @classmethod
    def prepare(cls, config: PromptConfig, model: nn.Module) -> None:
        """Fill the config's fields that follow from the model; raises where they contradict it."""

    def __init__(self, config: Any, model: nn.Module, materialized: bool = False) -> None:
        super().__init__()
        self.config = config
        self.encoder: Any = None if materialized else self.make_encoder(config)
        self.embedding: Any = nn.Parameter(torch.empty(self.shape(config))) if self.encoder is None else None

    @staticmethod
    def shape(config: Any) -> tuple[int, int]:
        """Of the materialized form."""
        return config.num_virtual_tokens * config.num_transformer_submodules, config.token_dim

    @staticmethod
    def make_encoder(config: Any) -> nn.Module | None:
        """A module that, called without arguments, computes the materialized form; None where that is trained itself."""
        return None

    def values(self) -> Tensor:
        """The materialized form."""
        values: Tensor = self.embedding if self.encoder is None else self.encoder()
        return values

    def forward(self, *args: Any) -> Tensor:
        return self.values()


class ParameterAdapter(Adapter):
    """Private values for single parameters of a module of any type, swapped in for the call.

    What is called is a view of the module, a shallow copy whose named parameters are this adapter's own, so the base's
    tensors stay as they are. Subclasses change parameters that no module computes with alone (`target_parameters`).
    """

    def __init__(self, module: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.names = names
        for name in names:
            self.register_parameter(name, nn.Parameter(whole(getattr(module, name)).detach().clone()))

    def private_values(self) -> list[str]:
        return list(self._parameters)

    def in_file(self, beside: bool) -> dict[str, Tensor]:
        prefix = "base_layer." if beside else ""
        return {f"{prefix}{name}": tensor for name, tensor in super().in_file(beside).items()}

    def forward(self, module: nn.Module) -> nn.Module:
        """A view of `module` that holds the private values."""
        return module_view(module, self.replaced(module))

    def replaced(self, module: nn.Module) -> dict[str, Tensor]:
        """`{parameter: value}` that acts in place of the module's own, and that merging puts into it."""
        return {name: value.to(getattr(module, name).dtype) for name, value in self.named_parameters()}


class StoredValues(ParameterAdapter):
    """Values of a module's parameters that come with an adapter's file, such as the embeddings of a resized vocabulary.

    They act as private values and are not trained.
    """

    def __init__(self, module: nn.Module, settings: StoredSettings) -> None:
        Adapter.__init__(self)
        self.names = list(settings.follows)
        self.prefix = settings.prefix
        for name, follows in settings.follows.items():
            if follows is None:
                own = getattr(module, name)
                self.register_buffer(name, torch.empty(own.shape, dtype=own.dtype))

    def _value(self, name: str) -> Tensor:
        value: Tensor = getattr(self if name in self._buffers else self.owner, name)
        return value

    def private_values(self) -> list[str]:
        return list(self.names)

    def in_file(self, beside: bool) -> dict[str, Tensor]:
        return {f"{self.prefix}{name}": self._value(name) for name in self.names}

    def replaced(self, module: nn.Module) -> dict[str, Tensor]:
        return {name: self._value(name).to(getattr(module, name).dtype) for name in self.names}


class ModuleCopy(Adapter):
    """A private, trainable copy of a whole module, called in its place (`modules_to_save`, task heads); always dense."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = dense_copy(module).requires_grad_(True)

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def parts(self) -> Iterator[tuple[str, Adapter]]:
        return ((path, self._part({"module": inner})) for path, inner in self.module.named_modules() if path)

    def in_file(self, beside: bool) -> dict[str, Tensor]:
        return self.module.state_dict(keep_vars=True)

    def replaced(self, module: nn.Module) -> dict[str, Tensor]:
        """`{parameter or buffer: value}` that merging puts into the module."""
        return {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}


class TiedWeight(ParameterAdapter):
    """The weight of the private copy that it follows, on another module that holds the copied module's weight."""

    def __init__(self) -> None:
        Adapter.__init__(self)
        self.names = ["weight"]

    @property
    def weight(self) -> Tensor:
        owner: Any = self.owner
        return owner.module.weight  # type: ignore[no-any-return]

    def private_values(self) -> list[str]:
        return self.names

    def in_file(self, beside: bool) -> dict[str, Tensor]:
        return {"weight": self.weight}

    def replaced(self, module: nn.Module) -> dict[str, Tensor]:
        if is_partitioned(self.weight):
            raise UsageError(
                "ensure_weight_tying needs the copied embedding's weight at other modules, too, where ZeRO's stage 3 does not "
                "gather it; use stage 2, or leave ensure_weight_tying out"
            )
        return {"weight": self.weight}
