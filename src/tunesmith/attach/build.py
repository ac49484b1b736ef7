"""From a plan to adapters: the tree that holds an adapter's tensors, and how it is built.

The adapters of a tree mirror the paths of the modules they belong to; the base itself is only read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..adapter import Adapter, LinearAdapter, ModuleCopy, ParameterAdapter, PromptAdapter
from ..bases.precision import adapter_dtype, master_dtype
from ..bases.view import execution_device, view_of
from ..config import PeftConfig, PromptConfig
from ..methods.lora_parameters import LoraParameters
from ..methods.trainable_tokens import TokenRows
from ..registry import adapter_type
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
    tree = AdapterTree()
    kind = adapter_type(config)
    if isinstance(config, PromptConfig):
        assert issubclass(kind, PromptAdapter)
        with torch.device(execution_device(model.get_input_embeddings())):
            prompt = kind(config, model, materialized)
            if initialise:
                prompt.reset_parameters(model)
        tree.add_module("_prompt", prompt)
    modules = {path: model.get_submodule(path) for path in plan.adapted}
    shared = kind.shared_tensors(config, modules) if modules else None
    if shared is not None:
        first = next(iter(modules.values()))
        tree.add_module("_shared", shared.to(execution_device(first), adapter_dtype(first, full_precision)))
    for path, settings in plan.adapted.items():
        adapter = _build_one(kind, modules[path], config, settings, shared, initialise)
        tree.add(path, "_adapter", adapter.to(adapter_dtype(modules[path], full_precision)))
    rows: dict[str, Adapter] = {}
    for path, settings in plan.tokens.items():
        module, settings = model.get_submodule(path), {**settings, "follows": rows.get(settings["follows"])}
        rows[path] = _build_one(TokenRows, module, config, settings, None, initialise)
        tree.add(path, "_tokens", rows[path].to(adapter_dtype(module, full_precision)))
    for path, named in plan.parameters.items():
        module, first = model.get_submodule(path), next(iter(named))
        with torch.device(execution_device(module)):
            changes = LoraParameters(module, config, named)  # type: ignore[arg-type]
            if initialise:
                changes.reset_parameters(module)
        tree.add(path, "_parameters_changed", changes.to(master_dtype(getattr(module, first).dtype, full_precision)))
    for path in plan.biases:
        tree.add(path, "_biases", ParameterAdapter(model.get_submodule(path), ["bias"]))
    for path in plan.copied:
        tree.add(path, "_copy", ModuleCopy(model.get_submodule(path)))
    return tree


def _build_one(kind: Any, module: nn.Module, config: Any, settings: dict[str, Any], shared: Any, initialise: bool) -> Adapter:
    base = view_of(module) if issubclass(kind, LinearAdapter) else module
    with torch.device(execution_device(module)):
        adapter = kind(base, config, settings)
        adapter.__dict__["shared"] = shared  # the tree's own module, registered there and nowhere else
        adapter.derive(base)
        if initialise:
            adapter.reset_parameters(base)
    return adapter
