"""Which adapters are in effect in a call: the handle's frames, one for each set of names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..adapter import Adapter, PromptAdapter
from ..attach.conflicts import conflict
from ..config import PromptConfig
from ..errors import UsageError
from ..runtime import prefix, site
from ..runtime.frame import BASE_ROW, Around, Frame, Mixture, Place, Replacement
from . import schedules
from .state import HandleState

BySite = dict[Place, tuple[Adapter | Around | Replacement, ...]]
Prompts = tuple[tuple[PromptAdapter, int], ...]
SINGLE_EXPERT = re.compile(r"(^|\.)experts\.\d+(\.|$)")  # a module of a list of experts


class Frames(HandleState):
    """The part of a handle that turns names of adapters into frames.

    Attributes:
        effective_frame: the frame of the effective adapters. Calls only read it: reading names there would compile one graph
            per name (the limit is 8).
        _checked: what `preflight` has checked: names of adapters, whether they trained, and the method that was called.
    """

    effective_frame: Frame
    _checked: set[tuple[tuple[str, ...], bool, str]]
    _frames: dict[tuple[tuple[str, ...], bool], Frame]
    _single_experts: dict[str, list[str]]  # per adapter, the paths that keep it out of mixed batches
    _ways: list[tuple[Mapping[str, Any], str, Any]]  # a module's children, a name, the child: each step to adapted modules
    _conflict: str | None

    def _settle(self) -> None:
        """Derive the frame from the handle's state; must be called after each change of it."""
        self.effective_frame = self._frame_of(self._effective)
        self._conflict = conflict({name: self.tree(name) for name in (*self.merged_adapters, *self._effective)})

    def _forget(self) -> None:
        """Discard what is derived from adapters and base, and derive it again."""
        self._frames = {}
        self._ways = list(self._steps())
        self._single_experts = {}
        self._checked = set()
        self._settle()

    def _steps(self) -> Iterator[tuple[Mapping[str, Any], str, Any]]:
        seen = set()
        for path in (path for name in self.adapters for path, _ in self.tree(name).items()):
            module = self.bare_base
            for name in path.split(".") if path else ():
                children, module = module._modules, module._modules[name]
                if module not in seen:
                    seen.add(module)
                    yield children, name, module

    def _frame_of(self, names: tuple[str, ...]) -> Frame:
        """The frame in which these adapters are in effect together."""
        key = names, self.training
        if key not in self._frames:
            prompts = tuple(prompt for name in names if (prompt := self._prompt(name)) is not None)
            penalties = schedules.penalties(self, names)
            self._frames[key] = self._frame(self._by_site(names), prompts, penalties=penalties, names=names)
        return self._frames[key]

    def _frame(self, adapters: BySite, prompts: Prompts, **more: Any) -> Frame:
        return Frame(adapters, prompts, state=self._own, training=self.training, **more)

    def _prompt(self, name: str) -> tuple[PromptAdapter, int] | None:
        """An adapter's virtual tokens and their number, if it has any."""
        prompt, config = self.tree(name).prompt, self.peft_config[name]
        if prompt is None:
            return None
        assert isinstance(config, PromptConfig) and config.num_virtual_tokens is not None
        return prompt, config.num_virtual_tokens

    def _mixed_frame(self, names: Iterable[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Frame:
        """The frame of a batch with one adapter per row.

        Args:
            names: for each row the name of its adapter, or "__base__".
            args, kwargs: of the call, whose first tensor has the rows.

        Raises:
            UsageError: there is not one name for each row, or adapters are merged into the base's weights.
            AdapterNameError: the handle has no such adapter.
        """
        if isinstance(names, str):
            raise UsageError(f'adapter_names="{names}" must be a list with one name for each row')
        names = list(names)
        tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        first = next((value for value in tensors if value.dim()), None)
        if first is not None and len(names) != first.shape[0]:
            raise UsageError(f"adapter_names holds {len(names)} names for {first.shape[0]} rows; give one for each row")
        for name in dict.fromkeys(names):
            if name != BASE_ROW:
                self.require_adapter(name)
                self._check_no_single_experts(name)
        if self.merged_adapters:
            merged = ", ".join(f'"{name}"' for name in self.merged_adapters)
            raise UsageError(f"{merged} is merged into the weights, so it would affect every row; call unmerge_adapter() first")
        return self._mixture(names, None if first is None else first.device)

    def _mixture(self, names: list[str], device: torch.device | None) -> Frame:
        """One frame made of those of all names; the plain frame if all rows have the same name."""
        rows_of: dict[str, list[int]] = {}
        for row, name in enumerate(names):
            rows_of.setdefault(BASE_ROW if self._disabled else name, []).append(row)
        frames = [self._frame_of(() if name == BASE_ROW else (name,)) for name in rows_of]
        if len(frames) == 1:
            return frames[0]
        groups = [torch.tensor(rows, device=device) for rows in rows_of.values()]
        prompts = tuple(prompt for frame in frames for prompt in frame.prompts)
        penalties = tuple(penalty for frame in frames for penalty in frame.penalties)
        effective = tuple(sorted(rows_of.keys() - {BASE_ROW}))
        return self._frame({}, prompts, mixture=Mixture(frames, groups), penalties=penalties, names=effective)

    def _check_no_single_experts(self, name: str) -> None:
        """Modules of a list of experts get tokens of any rows in any order, so their inputs cannot be split by rows."""
        if name not in self._single_experts:
            self._single_experts[name] = [path for path, _ in self.tree(name).items() if SINGLE_EXPERT.search(path)]
        if self._single_experts[name]:
            raise UsageError(
                f'"{name}" adapts individual experts ({self._single_experts[name][0]}, ...), whose tokens cannot be assigned '
                "to rows; run such a batch one adapter at a time"
            )

    def _by_site(self, names: tuple[str, ...]) -> BySite:
        """`{site: adapters}`, at each site in the order of `names` and, within one adapter, of its kinds."""
        found: BySite = {}
        for name in names:
            for path, adapter in self.tree(name).items():
                self._add(found, path, adapter)
                for inner, part in adapter.parts():
                    if site.fault(self.bare_base.get_submodule(f"{path}.{inner}")) is None:
                        self._add(found, f"{path}.{inner}", part)
            prompt = self.tree(name).prompt
            if prompt is not None and prompt.in_cache:
                for path, around in prefix.places(prompt, self.bare_base):
                    self._add(found, path, around)
        return found

    def _add(self, found: BySite, path: str, adapter: Adapter | Around) -> None:
        at = site.install(self.bare_base.get_submodule(path))
        found[at] = (*found.get(at, ()), adapter)
