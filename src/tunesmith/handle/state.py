"""What all parts of a handle share: its base, its adapters, and which of them are active.

Each ability is a class in a file of its own that derives from this one; `PeftModel` is all of them together.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar, cast

import torch
from torch import nn

from ..attach.tree import AdapterTree
from ..config import PeftConfig
from ..errors import AdapterNameError, did_you_mean
from ..merge.weights import Originals
from ..runtime import recompute
from ..runtime.own_state import OwnState
from ..runtime.virtual_tokens import InputSpec, input_spec_of

NAMES_SHOWN = 20  # in an error that lists the adapters of a handle


class HandleState(nn.Module):
    """A base with adapters beside it.

    Attributes:
        adapters: each adapter's tensors, by name.
        peft_config: each adapter's configuration, with everything filled in that follows from the base.
        _active: names of the selected adapters, in the order in which they are applied.
        _disabled: whether the adapters are switched off.
        merged_adapters: for each adapter merged into the base's weights, the tensors that it replaced.
        _accepts: names of the parameters of the base's forward.
        input_spec: what must be known about the base to put virtual tokens in front of its input.
        bare_base: the base itself, as it was given: called, it runs without adapters.
        _own: what this handle sets on the base's modules while it runs.
    """

    # Set by the task classes, for virtual tokens; see `InputSpec`.
    labels_per_token: ClassVar[bool] = False
    classifies: ClassVar[bool] = False

    adapters: nn.ModuleDict
    peft_config: dict[str, PeftConfig]
    _active: tuple[str, ...]
    _disabled: bool
    merged_adapters: dict[str, Originals]
    _accepts: tuple[str, ...]
    input_spec: InputSpec
    bare_base: Any
    _own: OwnState

    def _init_state(self, model: nn.Module) -> None:
        """Start with `model` and no adapters. (`__init__` would run `PreTrainedModel`'s; handles are such in name only.)"""
        nn.Module.__init__(self)
        self.__dict__["bare_base"] = model  # no submodule of the handle, which has proxies of it instead
        self._own = OwnState(model)
        recompute.install()
        self.adapters = nn.ModuleDict()
        self.peft_config = {}
        self._active = ()
        self._disabled = False
        self.merged_adapters = {}
        self._accepts = tuple(inspect.signature(type(model).forward).parameters)[1:]
        self.input_spec = input_spec_of(
            model, frozenset(self._accepts), labels_per_token=self.labels_per_token, classifies=self.classifies
        )

    @property
    def _effective(self) -> tuple[str, ...]:
        """Names of the adapters that a call applies: active, not disabled, not merged into the weights."""
        return () if self._disabled else tuple(name for name in self._active if name not in self.merged_adapters)

    @property
    def _trains(self) -> bool:
        """Whether a call now is part of training, with gradients."""
        return self.training and torch.is_grad_enabled()

    def tree(self, name: str) -> AdapterTree:
        """The tensors of one adapter."""
        return cast(AdapterTree, self.adapters[name])

    def require_adapter(self, name: str) -> None:
        """
        Raises:
            AdapterNameError: this handle has no adapter of that name.
        """
        if name not in self.peft_config:
            known = ", ".join(f'"{known}"' for known in list(self.peft_config)[:NAMES_SHOWN]) or "none"
            more = f" and {len(self.peft_config) - NAMES_SHOWN} more" if len(self.peft_config) > NAMES_SHOWN else ""
            raise AdapterNameError(
                f'no adapter "{name}"{did_you_mean(str(name), self.peft_config)}; adapters here: {known}{more}'
            )

    def _named(self, names: str | list[str] | tuple[str, ...]) -> tuple[str, ...]:
        """One or several names as a tuple without duplicates.

        Raises:
            AdapterNameError: this handle has no adapter of one of the names.
        """
        found = tuple(dict.fromkeys(names if isinstance(names, (list, tuple)) else [names]))
        for name in found:
            self.require_adapter(name)
        return found
