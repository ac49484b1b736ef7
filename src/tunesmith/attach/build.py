"""From a plan to adapters: the tree that holds an adapter's tensors, and how it is built.

The adapters of a tree mirror the paths of the modules they belong to; the base itself is only read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..adapter import Adapter, LinearAdapter, ModuleCopy, ParameterAdapter, PromptAdapter, StoredValues, TiedWeight
from ..bases.precision import adapter_dtype, master_dtype
from ..bases.view import execution_device, view_of
from ..config import PeftConfig, PromptConfig, Settings
from ..registry import adapter_type, part_type
from .plan import Plan
from .tree import AdapterTree


def build(
    model: Any, config: PeftConfig, plan: Plan, *, full_precision: bool, initialise: bool, materialized: bool = False
) -> AdapterTree:
    """Make the adapter that `plan` describes, on the devices of the modules it belongs to.

    Args:
        full_precision: fp32 masters beside a 16-bit base.
        initialise: draw initial values; False when weights are about to be loaded.
        materialized: build virtual tokens without the encoder that trains them.
    """
    builder = Builder(model, config, plan, full_precision, initialise)
    if isinstance(config, PromptConfig):
        builder.add_virtual_tokens(materialized)
    builder.add_adapters()
    builder.add_token_rows()
    builder.add_parameters()
    for path in plan.biases:
        builder.tree.add(path, "_biases", ParameterAdapter(model.get_submodule(path), ["bias"]))
    for path in plan.copied:
        builder.tree.add(path, "_copy", ModuleCopy(model.get_submodule(path)))
    replace_stored(builder.tree, stored_values(model, plan))
    builder.add_ties()
    return builder.tree


def stored_values(model: nn.Module, plan: Plan) -> dict[str, StoredValues]:
    """Places for the values that come with an adapter's file, by module path."""
    made = {}
    for path, settings in plan.stored.items():
        module = model.get_submodule(path)
        with torch.device(execution_device(module)):
            made[path] = StoredValues(module, settings)
    for path, settings in plan.stored.items():
        for source in set(settings.follows.values()) - {None}:
            made[path].follow(made[str(source)])
    return made


def stored_in(tree: AdapterTree) -> dict[str, StoredValues]:
    """The values in a tree that came with its adapter's file, by module path."""
    return {path: adapter for path, adapter in tree.items() if isinstance(adapter, StoredValues)}


def replace_stored(tree: AdapterTree, values: Mapping[str, StoredValues]) -> dict[str, StoredValues]:
    """Put stored values into a tree in place of those that it has, which are returned."""
    before = stored_in(tree)
    for path in before:
        del tree.node(path)._modules["_stored"]
    for path, adapter in values.items():
        tree.add(path, "_stored", adapter)
    return before


@dataclass
class Builder:
    """One adapter under construction; each method adds one kind of part to the tree."""

    model: Any
    config: PeftConfig
    plan: Plan
    full_precision: bool
    initialise: bool

    def __post_init__(self) -> None:
        self.tree = AdapterTree()

    def add_virtual_tokens(self, materialized: bool) -> None:
        with torch.device(execution_device(self.model.get_input_embeddings())):
            prompt: PromptAdapter = adapter_type(self.config)(self.config, self.model, materialized)
            if self.initialise:
                prompt.reset_parameters(self.model)
        self.tree.add_module("_prompt", prompt)

    def add_adapters(self) -> None:
        """The method's own adapters, and the tensors that they share."""
        kind = adapter_type(self.config)
        modules = {path: self.model.get_submodule(path) for path in self.plan.adapted}
        shared = kind.shared_tensors(self.config, modules) if modules else None
        if shared is not None:
            first = next(iter(modules.values()))
            self.tree.add_module("_shared", shared.to(execution_device(first), adapter_dtype(first, self.full_precision)))
        for path, settings in self.plan.adapted.items():
            adapter = self._at_module(kind, modules[path], settings, shared)
            self.tree.add(path, "_adapter", adapter.to(adapter_dtype(modules[path], self.full_precision)))

    def add_token_rows(self) -> None:
        rows: dict[str, Adapter] = {}
        for path, settings in self.plan.tokens.items():
            module = self.model.get_submodule(path)
            rows[path] = self._at_module(part_type("_tokens"), module, settings)
            if settings.follows is not None:
                rows[path].follow(rows[settings.follows])
            self.tree.add(path, "_tokens", rows[path].to(adapter_dtype(module, self.full_precision)))

    def add_parameters(self) -> None:
        for path, settings in self.plan.parameters.items():
            module = self.model.get_submodule(path)
            with torch.device(execution_device(module)):
                changes: Adapter = part_type("_parameters_changed")(module, self.config, settings)
                if self.initialise:
                    changes.reset_parameters(module)
            first = getattr(module, next(iter(settings)))
            self.tree.add(path, "_parameters_changed", changes.to(master_dtype(first.dtype, self.full_precision)))

    def add_ties(self) -> None:
        """Modules that follow the embedding whose weight they hold: its adapter, or its private copy."""
        for path, source in self.plan.ties.items():
            owner = self.tree.node(source).own
            follower: Adapter
            if owner is None:
                owner, follower = self.tree.node(source).at("_copy"), TiedWeight()
            else:
                follower = self._at_module(part_type("_tied"), self.model.get_submodule(path), self.plan.adapted[source])
            assert owner is not None
            follower.follow(owner)
            self.tree.add(path, "_tied", follower)

    def _at_module(self, kind: Any, module: nn.Module, settings: Settings, shared: nn.Module | None = None) -> Adapter:
        base = view_of(module) if issubclass(kind, LinearAdapter) else module
        with torch.device(execution_device(module)):
            adapter: Adapter = kind(base, self.config, settings)
            adapter.__dict__["shared"] = shared  # the tree's own module, registered there and nowhere else
            adapter.derive(base)
            if self.initialise:
                adapter.reset_parameters(base)
        return adapter
