"""Embeddings of a base in an adapter's file: which are written, under what names, and what becomes of them when they are read.

A file holds them where the base alone would not give them back: after its vocabulary was resized, or where the caller says
so. Read again, values that differ from the base's act as private ones of the handle (`adapter.StoredValues`).

    <module path>.weight                              an embedding or output head without adapters
    <module path>.base_layer.weight                   one with the method's own adapter on it
    <module path>.token_adapter.base_layer.weight     one with trained rows beside it
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..adapter import StoredSettings
from ..assets import resolve
from ..attach.plan import Plan
from ..bases import architecture
from ..bases.quantised import view_if_quantised
from ..config import PeftConfig
from ..errors import UsageError
from ..handle.state import HandleState
from ..paths import is_inside
from .given import Wanted
from .names import prefix_of

Choice = bool | Literal["auto"]

# The ecosystem's names: with a target called so, "auto" writes what lies under the adapter.
_USUAL_NAMES = ("embed_tokens", "lm_head")
_PLAIN, _UNDER_ADAPTER, _UNDER_ROWS = "", "base_layer.", "token_adapter.base_layer."


def parameters(base: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """`(module path, name, parameter)` of the input embeddings and the output head; nothing of a base that has neither."""
    ends = [end for end in (architecture.input_embeddings(base), architecture.output_head(base)) if end is not None]
    for end in dict.fromkeys(ends):
        at = next((path for path, module in base.named_modules() if module is end), None)
        if not at:
            continue  # not a module inside the base
        for path, module in end.named_modules(prefix=at):
            yield from ((path, name, parameter) for name, parameter in module._parameters.items() if parameter is not None)


def _under(path: str, adapted: Collection[str], with_rows: Collection[str], config: PeftConfig) -> str:
    """What files put between the path of a module and the name of its own parameter."""
    if path in adapted or (path in with_rows and config.method == "TRAINABLE_TOKENS"):
        return _UNDER_ADAPTER
    return _UNDER_ROWS if path in with_rows else _PLAIN


# --- writing --------------------------------------------------------------------------------------------------------


def written(handle: HandleState, name: str, choice: Choice) -> dict[str, Wanted]:
    """The base's own embeddings that go into an adapter's file, by their names there.

    Raises:
        UsageError: they are asked for, and the base has none, or none in plain form.
    """
    base, config, tree = handle.bare_base, handle.peft_config[name], handle.tree(name)
    if choice is False:
        return {}
    everything = choice is True or _is_resized(base, config)
    adapted = tree.adapted()
    with_rows = {path for path, adapter in tree.items() if adapter is tree.node(path).at("_tokens")}
    copied = {path for path, adapter in tree.items() if adapter is tree.node(path).at("_copy")}
    private = {(path, leaf) for path, adapter in tree.items() for leaf in adapter.private_values()}
    found: dict[str, Wanted] = {}
    quantised = []
    for path, leaf, parameter in parameters(base):
        targeted = path in adapted and path.rpartition(".")[2] in _USUAL_NAMES
        if (path, leaf) in private or any(is_inside(path, other) for other in copied) or not (everything or targeted):
            continue  # the adapter has its own value, or none is asked for
        if view_if_quantised(base.get_submodule(path)) is not None:
            quantised.append(path)
            continue
        in_file = f"{prefix_of(config)}{path}.{_under(path, adapted, with_rows, config)}{leaf}"
        now = _unmerged(handle, path, leaf, parameter)
        found[in_file] = Wanted(f"base_model.{path}.{leaf}", (in_file,), now, of_base=True, needed=everything)
    if choice is True and quantised:
        raise UsageError(f"save_embedding_layers=True: {quantised[0]} is quantised, so it has no plain weight to write")
    if choice is True and next(parameters(base), None) is None:
        raise UsageError(f"save_embedding_layers=True: {type(base).__name__} names no embeddings; leave it out")
    return found


def _is_resized(base: nn.Module, config: PeftConfig) -> bool:
    """Whether the base's vocabulary has another size than that of the model whose name the adapter's file will give."""
    if not config.base_model_name_or_path:
        return False
    published = architecture.vocabulary_of(base, resolve(config.base_model_name_or_path))
    return published is not None and published != architecture.vocabulary_of(base)


def _unmerged(handle: HandleState, path: str, leaf: str, parameter: Tensor) -> Tensor:
    """The base's own parameter, while adapters are merged into it, too."""
    return next((kept[path, leaf] for kept in handle.merged_adapters.values() if (path, leaf) in kept), parameter)


# --- reading --------------------------------------------------------------------------------------------------------


def taken(
    stored: dict[str, Tensor], config: PeftConfig, plan: Plan, base: nn.Module
) -> tuple[dict[str, Tensor], dict[str, StoredSettings]]:
    """The tensors of a file less embeddings that this base has anyway, and what `Plan.stored` is for the others.

    Modules that share one parameter share its private value, too; a file may name only one of them.
    """
    stored, prefix = _without_second_names(stored, config, plan), prefix_of(config)
    shared: dict[nn.Parameter, dict[tuple[str, str], Tensor | None]] = {}
    for path, leaf, parameter in parameters(base):
        if any(is_inside(path, other) for other in plan.copied) or (leaf == "bias" and path in plan.biases):
            continue
        keys = [key for under in (_PLAIN, _UNDER_ADAPTER, _UNDER_ROWS) if (key := f"{prefix}{path}.{under}{leaf}") in stored]
        shared.setdefault(parameter, {})[path, leaf] = stored.pop(keys[0]) if keys else None
    found: dict[str, StoredSettings] = {}
    for parameter, places in shared.items():
        if all(value is None or _same(value, parameter) for value in places.values()):
            continue
        first, shared_value = next((place, value) for place, value in places.items() if value is not None)
        for (path, leaf), given in places.items():
            own = shared_value if given is None else given
            follows = (path, leaf) != first and torch.equal(own, shared_value)
            settings = found.setdefault(path, StoredSettings({}, _under(path, plan.adapted, plan.tokens, config)))
            settings.follows[leaf] = first[0] if follows else None
            stored[f"{prefix}{path}.{settings.prefix}{leaf}"] = own
    return stored, found


def _without_second_names(stored: dict[str, Tensor], config: PeftConfig, plan: Plan) -> dict[str, Tensor]:
    """The tensors less the names that trained rows have at a tied head, which follows them."""
    kept = dict(stored)
    for path, rows in plan.tokens.items():
        second, first = (f"{prefix_of(config)}{at}.token_adapter.trainable_tokens_delta" for at in (path, rows.follows))
        if second in stored and first in stored and torch.equal(stored[second], stored[first]):
            del kept[second]
    return kept


def _same(stored: Tensor, own: Any) -> bool:
    """Whether a stored tensor is a parameter's value, as far as the narrower of their types can tell."""
    if own.device.type == "meta" or stored.shape != own.shape:
        return False
    own = (own.full_tensor() if hasattr(own, "full_tensor") else own).detach().to(stored.device)
    return torch.equal(stored.to(own.dtype), own) or torch.equal(own.to(stored.dtype), stored)
