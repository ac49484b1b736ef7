"""Adapters that cannot act together: one has a private value for what another changes, so the other would be hidden."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..adapter import ModuleCopy
from ..paths import is_inside
from .tree import AdapterTree


def conflict(trees: Mapping[str, AdapterTree]) -> str | None:
    """Why these adapters, by name, cannot act together; None where they can."""
    if len(trees) < 2:
        return None
    reason = next(_conflicts(trees), None)
    return reason and f"{reason}; make one of them active at a time, or give adapter_names, one for each row"


def _conflicts(trees: Mapping[str, AdapterTree]) -> Iterator[str]:
    prompts = [name for name, tree in trees.items() if tree.prompt is not None]
    if len(prompts) > 1:
        yield f"only one adapter with virtual tokens can be active at a time, not {' and '.join(map(_quoted, prompts))}"
    sites = [(name, path, adapter) for name, tree in trees.items() for path, adapter in tree.items()]
    for name, path, adapter in sites:
        if isinstance(adapter, ModuleCopy):
            for other, inner, _ in sites:
                if other != name and is_inside(inner, path):
                    yield f'"{name}" trains a private copy of {path}, which would hide the adapter of "{other}" at {inner}'
    owners: dict[tuple[str, str], str] = {}
    for name, path, adapter in sites:
        for value in adapter.private_values():
            owner = owners.setdefault((path, value), name)
            if owner != name:
                yield f'"{owner}" and "{name}" both train {path}.{value}, and only one of the two values can be in effect'


def _quoted(name: str) -> str:
    return f'"{name}"'
