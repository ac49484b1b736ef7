"""The tree that holds an adapter's tensors; it mirrors the paths of the modules they belong to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from torch import nn

from ..adapter import Adapter, PromptAdapter
from ..errors import AdapterNameError
from ..runtime.frame import BASE_ROW


class Branch(nn.Module):
    """A node of an adapter's tree, which mirrors module paths: `adapters.<name>.model.layers.0.self_attn.q_proj`.

    What sits at a node hangs under it by kind, in the order in which the kinds act on a module.
    """

    KINDS = ("_stored", "_biases", "_tokens", "_parameters_changed", "_adapter", "_tied", "_copy")

    def add(self, path: str, kind: str, adapter: Adapter) -> None:
        assert kind in self.KINDS
        node = self
        for part in path.split("."):
            if part not in node._modules:
                node._modules[part] = Branch()  # not add_module, which refuses names such as "items"
            child = node._modules[part]
            assert isinstance(child, Branch)
            node = child
        node.add_module(kind, adapter)

    def node(self, path: str) -> Branch:
        """The node of a module; unlike `get_submodule`, with any name a base's module may have."""
        node = self
        for part in path.split("."):
            child = node._modules[part]
            assert isinstance(child, Branch)
            node = child
        return node

    @property
    def own(self) -> Adapter | None:
        """The method's adapter at this node, rather than a bias or a copy beside it."""
        return self.at("_adapter")

    def at(self, kind: str) -> Adapter | None:
        """What hangs here as `kind`."""
        found = self._modules.get(kind)
        assert found is None or isinstance(found, Adapter)
        return found

    def items(self, prefix: str = "") -> Iterator[tuple[str, Adapter]]:
        """`(path, adapter)` of every module adapter below."""
        for kind in self.KINDS:
            found = self.at(kind)
            if found is not None:
                yield prefix, found
        for name, child in self._modules.items():
            if isinstance(child, Branch):
                yield from child.items(f"{prefix}.{name}" if prefix else name)


class AdapterTree(Branch):
    """All tensors of one adapter: those at modules, and the virtual tokens if it has some."""

    @property
    def prompt(self) -> PromptAdapter | None:
        found = self.at("_prompt")
        assert found is None or isinstance(found, PromptAdapter)
        return found

    @property
    def trains_encoder(self) -> bool:
        """Whether virtual tokens are computed by an encoder, because they are being trained."""
        return self.prompt is not None and self.prompt.encoder is not None

    def adapted(self) -> dict[str, Adapter]:
        """The method's own adapters, by path; not what hangs beside them."""
        return {path: adapter for path, adapter in self.items() if adapter is self.node(path).own}

    @property
    def shared(self) -> nn.Module | None:
        """Tensors that all module adapters of this tree use."""
        return self._modules.get("_shared")


def check_name(name: str, taken: Iterable[str]) -> None:
    """Refuse adapter names that are taken or that could not be a folder's and a tensor's name."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w][\w\- ]{0,127}", name):
        raise AdapterNameError(
            f"adapter name {name!r} is not usable; use letters, digits, '_', '-' and spaces (it becomes a folder name)"
        )
    if name == BASE_ROW:
        raise AdapterNameError(f'adapter name "{name}" is reserved for rows without an adapter; choose another')
    if hasattr(nn.ModuleDict(), name):
        raise AdapterNameError(f'adapter name "{name}" is reserved by PyTorch; choose another')
    if name in taken:
        raise AdapterNameError(f'adapter name "{name}" is taken; names in use: {", ".join(taken)}')
