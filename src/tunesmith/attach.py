"""From a plan to adapters: the tree that holds an adapter's tensors, and how it is built.

The adapters of a tree mirror the paths of the modules they belong to; the base itself is only read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from .bases.view import execution_device, view_of
from .config import PeftConfig, PromptConfig
from .contracts import Adapter, LinearAdapter, ModuleCopy, ParameterAdapter, PromptAdapter, adapter_dtype, master_dtype
from .errors import AdapterNameError
from .frame import BASE_ROW
from .match import Plan
from .methods.lora_parameters import LoraParameters
from .methods.trainable_tokens import TokenRows
from .registry import adapter_type


class Branch(nn.Module):
    """A node of an adapter's tree, which mirrors module paths: `adapters.<name>.model.layers.0.self_attn.q_proj`.

    What sits at a node hangs under it by kind, in the order in which the kinds act on a module.
    """

    KINDS = ("_biases", "_tokens", "_parameters_changed", "_adapter", "_copy")

    def add(self, path: str, kind: str, adapter: Adapter) -> None:
        assert kind in self.KINDS
        node: Any = self
        for part in path.split("."):
            if part not in node._modules:
                node._modules[part] = Branch()  # not add_module, which refuses names such as "items"
            node = node._modules[part]
        node.add_module(kind, adapter)

    def node(self, path: str) -> Branch:
        """The node of a module; unlike `get_submodule`, with any name a base's module may have."""
        node: Any = self
        for part in path.split("."):
            node = node._modules[part]
        return node

    @property
    def own(self) -> Adapter | None:
        """The method's adapter at this node, rather than a bias or a copy beside it."""
        found: Any = self._modules.get("_adapter")
        return found

    def items(self, prefix: str = "") -> Iterator[tuple[str, Adapter]]:
        """`(path, adapter)` of every module adapter below."""
        for kind in self.KINDS:
            found: Any = self._modules.get(kind)
            if found is not None:
                yield prefix, found
        for name, child in self._modules.items():
            if isinstance(child, Branch):
                yield from child.items(f"{prefix}.{name}" if prefix else name)


class AdapterTree(Branch):
    """All tensors of one adapter: those at modules, and the virtual tokens if it has some."""

    @property
    def prompt(self) -> PromptAdapter | None:
        found: Any = self._modules.get("_prompt")
        return found

    @property
    def shared(self) -> nn.Module | None:
        """Tensors that all module adapters of this tree use."""
        return self._modules.get("_shared")


def build(
    model: Any, config: PeftConfig, plan: Plan, *, full_precision: bool, initialise: bool, finished: bool = False
) -> AdapterTree:
    """Make the adapter that `plan` describes, on the devices of the modules it belongs to.

    Args:
        full_precision: fp32 masters beside a 16-bit base.
        initialise: draw initial values; False when weights are about to be loaded.
        finished: build virtual tokens without the encoder that trains them.
    """
    tree = AdapterTree()
    kind = adapter_type(config)
    if isinstance(config, PromptConfig):
        assert issubclass(kind, PromptAdapter)
        with torch.device(execution_device(model.get_input_embeddings())):
            prompt = kind(config, model, finished)
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


def check_name(name: str, taken: Iterable[str]) -> None:
    """Refuse adapter names that are taken or that could not be a folder's and a tensor's name."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w][\w\- ]{0,127}", name):
        raise AdapterNameError(
            f"adapter name {name!r} is not usable; use letters, digits, '_', '-' and spaces (it becomes a folder's name)"
        )
    if name == BASE_ROW:
        raise AdapterNameError(f'adapter name "{name}" stands for rows without an adapter; take another')
    if hasattr(nn.ModuleDict(), name):
        raise AdapterNameError(f'adapter name "{name}" is a word of PyTorch\'s own; take another')
    if name in taken:
        raise AdapterNameError(f'adapter name "{name}" is taken; names in use: {", ".join(taken)}')
