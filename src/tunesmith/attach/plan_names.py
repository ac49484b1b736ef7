"""Paths and the names for them: which modules are linear, which endings name them and no others, what to suggest."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..bases.dense import LinearView
from ..bases.view import view_type
from ..config import TargetedConfig
from ..errors import Unmatched, nearest

HEAD_NAMES = ("classifier", "score", "qa_outputs")  # task heads that transformers initialises at random


def linear_paths(model: Any, modules: dict[str, nn.Module]) -> set[str]:
    """Every linear module except the output head and task heads."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linear = {p for p, m in modules.items() if p and m is not head and issubclass(view_type(m) or object, LinearView)}
    return {path for path in linear if path.rpartition(".")[2] not in HEAD_NAMES}


def short_names(chosen: Iterable[str], others: Iterable[str], parts: int = 1) -> set[str]:
    """The shortest endings, of at least so many parts, that name the chosen paths and none of the others."""
    ambiguous = {ending for path in others for ending in _endings(path)}
    return {next((end for end in _endings(path)[parts - 1 :] if end not in ambiguous), path) for path in chosen}


def _endings(path: str) -> list[str]:
    """Every ending of `path` at a dot, the shortest first."""
    parts = path.split(".")
    return [".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1)]


def of_layers(paths: list[str], config: TargetedConfig, faults: list[str]) -> list[str]:
    """Those of the paths that lie in the layers that `layers_to_transform` names."""
    wanted = config.layers_to_transform
    indices = {wanted} if isinstance(wanted, int) else set(wanted or [])
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    finder = rf"(?:.*\.)?(?:{'|'.join(map(re.escape, patterns))})\.(\d+)\." if patterns else r".*?\.(\d+)\."
    found = {path: int(hit[1]) for path in paths if (hit := re.match(finder, path))}
    missing = indices - set(found.values())
    if missing:
        present = sorted(set(found.values()))
        where = f"layers with targets: {present[0]} to {present[-1]}" if present else "the targets are not in numbered layers"
        faults.append(Unmatched(f"layers_to_transform: no target in layer {', '.join(map(str, sorted(missing)))}; {where}"))
    return [path for path in paths if found.get(path) in indices]


def some(paths: Iterable[str]) -> str:
    """`model.layers.0.mlp.gate (and 31 more)`."""
    first, *others = sorted(paths)
    return f"{first} (and {len(others)} more)" if others else first


def nearest_modules(name: str, modules: dict[str, nn.Module]) -> str:
    """`nearest: "q_proj" (32 modules), "k_proj" (32 modules)`."""
    counts: dict[str, int] = {}
    for path, module in modules.items():
        if path and view_type(module) is not None:
            leaf = path.rpartition(".")[2]
            counts[leaf] = counts.get(leaf, 0) + 1
    close = nearest(name.rpartition(".")[2], counts)
    if close:
        return "nearest: " + ", ".join(f'"{leaf}" ({counts[leaf]} modules)' for leaf in close)
    return f"there are {summary(modules)}"


def summary(modules: dict[str, nn.Module]) -> str:
    """The last names of the modules that can carry an adapter, twelve at most."""
    leaves = dict.fromkeys(path.rpartition(".")[2] for path, module in modules.items() if path and view_type(module))
    return ", ".join(f'"{leaf}"' for leaf in list(leaves)[:12]) or "no modules that can carry an adapter"
