"""From trained adapters to a new one: what can be combined, under which configuration, with which values."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor

from ..attach.build import replace_stored, stored_in
from ..attach.plan import match
from ..attach.tree import AdapterTree
from ..config import Settings, TargetedConfig
from ..errors import ConfigError, TargetError, UsageError, bullet_list
from ..methods.ia3 import IA3, IA3Settings
from ..methods.lora import Lora
from ..methods.prompt_tuning import PromptTuning
from . import lora
from .arithmetic import Member, Recipe
from .sums import weighted_sum

_TENSORS: dict[type, set[str]] = {Lora: {"lora_A", "lora_B"}, IA3: {"ia3_l"}, PromptTuning: {"embedding"}}


def combined(base: Any, members: list[Member], recipe: Recipe) -> tuple[Any, lora.Values]:
    """Configuration and values of the combination; nothing is changed.

    Raises:
        UsageError: the members' methods have no such arithmetic, or both train the same module whole.
        ConfigError: the recipe does not fit them.
    """
    kind = _kind(members)
    if kind is not Lora and recipe.combination_type != "linear":
        raise ConfigError(f'{members[0].config.method} adapters combine only by combination_type="linear"')
    owner = _owner(members)
    if kind is PromptTuning:
        return dataclasses.replace(owner.config), {"": {"embedding": _prompts(members)}}
    config = _united(base, members, owner.config)
    if kind is IA3:
        return config, _factors(members)
    config = lora.config(members, recipe, config)
    return config, lora.values(base, members, recipe, config)


def fill(tree: AdapterTree, values: lora.Values, members: list[Member]) -> None:
    """Put the values, and what the one member has of its own beside its factors, into a tree just built."""
    with torch.no_grad():
        for path, named in values.items():
            adapter: Any = tree.node(path).own if path else tree.prompt
            for name, value in named.items():
                getattr(adapter, name).copy_(value)
    replace_stored(tree, copy.deepcopy(stored_in(_owner(members).tree)))
    for path, private in _extras(_owner(members)).items():
        for kind, module in private.items():
            if kind == "_stored":
                continue
            tree.node(path)._modules[kind].load_state_dict(module.state_dict())  # type: ignore[union-attr]


def _kind(members: list[Member]) -> type:
    """The one adapter class of all members, whose tensors are exactly those that the arithmetic knows."""
    adapters = [(m, a) for m in members for a in ([m.tree.prompt] if m.tree.prompt is not None else m.tree.adapted().values())]
    kinds = {type(adapter) for _, adapter in adapters}
    if len(kinds) != 1:
        names = ", ".join(sorted(kind.__name__ for kind in kinds)) or "nothing at all"
        raise UsageError(f"only adapters of one method can be combined, got {names}")
    kind = kinds.pop()
    for member, adapter in adapters:
        held = {name for name, _ in (*adapter.named_parameters(), *adapter.named_buffers())}
        if _TENSORS.get(kind) != held or member.tree.shared is not None:
            what = f"{kind.__name__} ({', '.join(sorted(held))})"
            raise UsageError(f'"{member.name}" holds {what}, for which no combination is exact; {_WHICH}')
    return kind


_WHICH = "plain LoRA, IA3 and prompt tuning can be combined"


def _united(base: Any, members: list[Member], config: Any) -> Any:
    """`config` with the targets of all members: their names where these name exactly their modules, else the paths."""
    wanted = {path: on_input for m in members for path, on_input in _sides(m).items()}
    clashes = [path for m in members for path, on_input in _sides(m).items() if on_input != wanted[path]]
    if clashes:
        raise UsageError("some adapters scale the input of these modules, others the output:\n" + bullet_list(clashes))
    feeds = [path for path, on_input in wanted.items() if on_input]
    fields = ["target_modules"] + ["feedforward_modules"] * hasattr(config, "feedforward_modules")
    by_name = {name: _union([getattr(m.config, name) for m in members]) for name in fields}
    by_path: dict[str, Any] = dict(zip(fields, (set(wanted), set(feeds))))
    by_path |= {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
    for changes in (by_name, by_path):
        united = dataclasses.replace(config, **changes)
        try:
            plan, _ = match(base, dataclasses.replace(united, **_without_patterns(united)), current_names=True)
        except TargetError:
            continue
        if {path: _scales_input(settings) for path, settings in plan.adapted.items()} == wanted:
            return united
    raise UsageError(
        "no single target_modules names the modules of all these adapters; combine adapters with the same target_modules"
    )


def _without_patterns(config: TargetedConfig) -> dict[str, Any]:
    return {name: {} for name in config.pattern_keys()}


def _sides(member: Member) -> dict[str, bool]:
    """Of the member's modules by path: whether the adapter scales the input, which no combination can even out."""
    return {path: _scales_input(member.config.settings(path)) for path in member.tree.adapted()}


def _scales_input(settings: Settings) -> bool:
    return isinstance(settings, IA3Settings) and settings.scales_input


def _union(values: list[Any]) -> Any:
    """Names of all members: one regular expression, one set, or None where the two kinds do not mix."""
    values = [value for value in values if value is not None]
    if values and all(isinstance(value, str) for value in values):
        return "|".join(dict.fromkeys(f"({value})" for value in values))
    return None if any(isinstance(value, str) for value in values) else {name for value in values for name in value}


def _factors(members: list[Member]) -> lora.Values:
    """`sum_i w_i l_i`; a member without factors at a module leaves it alone, so its factors there are ones."""
    found: lora.Values = {}
    adapted = [member.tree.adapted() for member in members]
    for path in dict.fromkeys(path for each in adapted for path in each):
        there: list[Any] = [each.get(path) for each in adapted]
        one = next(adapter.ia3_l for adapter in there if adapter is not None)
        changes = [torch.ones_like(one) if adapter is None else adapter.ia3_l for adapter in there]
        found[path] = {"ia3_l": weighted_sum(changes, [member.weight for member in members])}
    return found


def _prompts(members: list[Member]) -> Tensor:
    tables: list[Any] = [member.tree.prompt for member in members]
    shapes = {tuple(table.embedding.shape) for table in tables}
    if len(shapes) > 1:
        counts = ", ".join(f'"{m.name}" has {m.config.num_virtual_tokens}' for m in members)
        raise UsageError(f"only adapters with the same number of virtual tokens can be combined, but {counts}")
    return weighted_sum([table.embedding for table in tables], [member.weight for member in members])


def _owner(members: list[Member]) -> Member:
    """The one member that trains modules or biases whole, which the combination takes over; else the first one.

    Raises:
        UsageError: several members do, and there is no arithmetic for whole modules.
    """
    owners = {id(member.tree): member for member in members if _extras(member)}
    if len(owners) > 1:
        names = ", ".join(f'"{member.name}"' for member in owners.values())
        raise UsageError(
            f"{names} each have modules or biases of their own (modules_to_save, bias, the task's head, stored embeddings), "
            "which cannot be combined; at most one of the adapters may"
        )
    return next(iter(owners.values()), members[0])


def _extras(member: Member) -> dict[str, dict[str, Any]]:
    """`{path: {kind: module}}` of biases, embeddings and modules that the member has private values of."""
    found: dict[str, dict[str, Any]] = {}
    for path in dict.fromkeys(path for path, _ in member.tree.items()):
        private = {
            kind: module for kind, module in member.tree.node(path)._modules.items() if kind in ("_stored", "_biases", "_copy")
        }
        if private:
            found[path] = private
    return found
