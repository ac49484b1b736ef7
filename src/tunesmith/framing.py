"""Which adapters act in a call: the handle's frames, made once for each set of names."""

from __future__ import annotations

import re
from typing import Any

import torch

from . import prefix, scheduled, site
from .bases import architecture
from .conflicts import conflict
from .errors import UsageError
from .frame import BASE_ROW, CarriesFrame, Frame, Mixture, entered


class Framing:
    """The part of a handle that turns names of adapters into frames."""

    def _entered(self: Any, frame: Frame | None = None) -> entered:
        """Ready the base for a call of this handle, and the context manager of the handle's frame."""
        base = self.base_model
        if base.training != self.training:
            base.train(self.training)
        if self.training:
            for module in self._checkpointing:
                function = architecture.recomputing_function(module)
                if function is not None and not isinstance(function, CarriesFrame):
                    architecture.set_recomputing_function(module, CarriesFrame(function))
        frame = self._frame if frame is None else frame
        if self._conflict is not None and frame.mixture is None and frame.names == self._frame.names:
            raise UsageError(self._conflict)
        if not torch.compiler.is_compiling() and any(at.module() is None for at in frame.adapters):
            raise UsageError(
                f"modules under adapters ({', '.join(frame.names)}) were replaced on the base, by resizing its embeddings, for "
                "one, so the adapters would not act; change the base first, then attach"
            )
        return entered(frame)

    def _acting(self: Any) -> tuple[str, ...]:
        """Names of the adapters that act in a call: active, not disabled, not already in the weights."""
        return () if self._disabled else tuple(name for name in self._active if name not in self._merged)

    def _settle(self: Any) -> None:
        """Make the frame that follows from the handle's state; to be called after each change of it.

        Calls only read `_frame`: reading names there would compile one graph per name (the limit is 8).
        """
        self._frame = self._frame_of(self._acting())
        self._conflict = conflict({name: self.tree(name) for name in (*self._merged, *self._acting())})

    def _frame_of(self: Any, acting: tuple[str, ...]) -> Frame:
        if acting not in self._frames:
            trees: list[Any] = [(self.tree(name).prompt, self.peft_config[name]) for name in acting]
            prompts = tuple((prompt, config.num_virtual_tokens) for prompt, config in trees if prompt is not None)
            penalties = scheduled.penalties(self, acting)
            self._frames[acting] = Frame(self._adapters_by_site(acting), prompts, penalties=penalties, names=acting)
        return self._frames[acting]

    def _mixed(self: Any, names: Any, args: tuple, kwargs: dict[str, Any]) -> Frame:
        """The frame of a batch with one adapter per row.

        Raises:
            UsageError: there is not one name for each row, or the base's weights are not its own now.
            AdapterNameError: an adapter is not here.
        """
        if isinstance(names, str):
            raise UsageError(f'adapter_names="{names}" must be a list that holds one name for each row')
        names = list(names)
        tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        first = next((value for value in tensors if value.dim()), None)
        if first is not None and len(names) != first.shape[0]:
            raise UsageError(f"adapter_names holds {len(names)} names for {first.shape[0]} rows; give one for each row")
        for name in dict.fromkeys(names):
            if name != BASE_ROW:
                self._known(name)
                self._check_splits(name)
        if self._merged:
            merged = ", ".join(f'"{name}"' for name in self._merged)
            raise UsageError(f"{merged} is merged into the weights, so it would act on every row; call unmerge_adapter() first")
        by_name: dict[str, list[int]] = {}
        for row, name in enumerate(names):
            by_name.setdefault(BASE_ROW if self._disabled else name, []).append(row)
        frames = [self._frame_of(() if name == BASE_ROW else (name,)) for name in by_name]
        acting = tuple(sorted(by_name.keys() - {BASE_ROW}))
        if len(frames) == 1:
            return frames[0]
        device = None if first is None else first.device
        groups = [torch.tensor(rows, device=device) for rows in by_name.values()]
        prompts = tuple(prompt for frame in frames for prompt in frame.prompts)
        penalties = tuple(penalty for frame in frames for penalty in frame.penalties)
        return Frame({}, prompts, mixture=Mixture(frames, groups), penalties=penalties, names=acting)

    def _check_splits(self: Any, name: str) -> None:
        """Modules of a list of experts get tokens of any rows in any order, so they cannot be told apart by rows."""
        if name not in self._splits:
            self._splits[name] = [path for path, _ in self.tree(name).items() if re.search(r"(^|\.)experts\.\d+(\.|$)", path)]
        if self._splits[name]:
            raise UsageError(
                f'"{name}" adapts single experts ({self._splits[name][0]}, ...), whose tokens are of no known row; '
                "run such a batch adapter by adapter"
            )

    def _adapters_by_site(self: Any, names: tuple[str, ...]) -> dict[site.Site, tuple]:
        """`{site: adapters}`, at each site in the order of `names` and, within one adapter, of its kinds."""
        by_site: dict[site.Site, tuple] = {}
        for name in names:
            for path, adapter in self.tree(name).items():
                at = site.install(self.base_model.get_submodule(path))
                by_site[at] = (*by_site.get(at, ()), adapter)
            prompt = self.tree(name).prompt
            if prompt is not None and prompt.in_cache:
                for path, around in prefix.places(prompt, self.base_model):
                    at = site.install(self.base_model.get_submodule(path))
                    by_site[at] = (*by_site.get(at, ()), around)
        return by_site

    def _forget(self: Any) -> None:
        """Drop what is derived from adapters and base, to be derived anew."""
        self._frames: dict[tuple[str, ...], Frame] = {}
        self._splits: dict[str, list[str]] = {}  # per adapter, the paths that keep it out of mixed batches
        self._checked: set[tuple[tuple[str, ...], bool]] = set()  # what preflight has looked into, in eval or training
        self._settle()
