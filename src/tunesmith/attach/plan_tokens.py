"""Which embeddings' rows a configuration trains, and which modules follow because they hold the same weight."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..adapter import TokenSettings
from ..bases.stored_tensors import shape_of
from ..bases.view import view_of
from ..errors import Unmatched, did_you_mean
from ..paths import ends_with
from .plan_ties import holders

TokenPlan = dict[str, TokenSettings]  # by module path, those that follow behind the ones that they follow


def plan_tokens(model: Any, modules: dict[str, nn.Module], config: Any, faults: list[str]) -> TokenPlan:
    """Resolve `trainable_token_indices` on the model: owners of rows first, then those that follow them."""
    wanted = getattr(config, "trainable_token_indices", None)
    if not wanted:
        return {}
    words = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if isinstance(wanted, dict):
        owners = _named(modules, wanted, faults)
    elif words is None:
        faults.append("trainable_token_indices: the model has no input embeddings; give {embedding's name: tokens}")
        return {}
    else:
        owners = {next(path for path, module in modules.items() if module is words): list(wanted)}
    faults += [fault for path, tokens in owners.items() for fault in _faults(path, modules[path], tokens)]
    plan = {path: TokenSettings(tuple(tokens)) for path, tokens in owners.items()}
    source = next((path for path, module in modules.items() if words is not None and module is words), None)
    tied = holders(modules, source) if source is not None else []
    if source in owners and all(owners.get(path, owners[source]) == owners[source] for path in tied):
        plan |= {path: TokenSettings(tuple(owners[source]), follows=source) for path in tied}
    elif getattr(config, "ensure_weight_tying", False) and set(tied) & owners.keys():
        faults.append(
            f"trainable_token_indices: {source} and {', '.join(tied)} hold one weight, which ensure_weight_tying keeps one; "
            "name the same tokens for all of them, or only for the embedding"
        )
    return dict(sorted(plan.items(), key=lambda item: item[1].follows is not None))


def _named(modules: dict[str, nn.Module], wanted: dict[str, list[int]], faults: list[str]) -> dict[str, list[int]]:
    owners: dict[str, list[int]] = {}
    for name, tokens in wanted.items():
        paths = [path for path in modules if ends_with(path, name)]
        if not paths:
            embeddings = {path.rpartition(".")[2] for path, module in modules.items() if isinstance(module, nn.Embedding)}
            nearby = did_you_mean(name, embeddings)
            faults.append(Unmatched(f'trainable_token_indices: no module matches "{name}"{nearby}'))
        owners |= {path: list(tokens) for path in paths}
    return owners


def _faults(path: str, module: nn.Module, tokens: list[int]) -> list[str]:
    if not isinstance(module, nn.Embedding | nn.Linear):
        return [f"trainable_token_indices: {path} is a {type(module).__name__}; name an embedding"]
    if module.weight.device.type == "meta":
        return [f"trainable_token_indices: {path} is offloaded, so its rows cannot be trained; keep it on a device"]
    reason = view_of(module).storage_fault()
    if reason:
        return [f"trainable_token_indices: {path}: {reason}"]
    rows = shape_of(module.weight)[0]
    beyond = [token for token in tokens if token >= rows]
    if beyond:
        return [f"trainable_token_indices: {path} has {rows} tokens, so token {beyond[0]} does not exist; resize it first"]
    return []
