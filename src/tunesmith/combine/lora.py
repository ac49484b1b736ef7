"""Combining LoRA adapters: on their factors, side by side, or on the changes they stand for."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from ..bases.view import view_of
from ..errors import ConfigError, UsageError
from .arithmetic import Member, Recipe
from .low_rank import factors_of, factors_of_product, padded

Values = dict[str, dict[str, Tensor]]  # {module path: {tensor: value}}


def config(members: list[Member], recipe: Recipe, united: Any) -> Any:
    """The configuration of the combination: its scale is 1, for the members' scales go into its values.

    Raises:
        ConfigError: the members' ranks differ, and the recipe sums up their factors.
    """
    ranks = [max(m.config.r, *(m.config.rank_pattern or {}).values(), 0) for m in members]
    if recipe.combination_type == "cat":
        rank = sum(ranks)
    elif recipe.on_whole_changes:
        rank = recipe.svd_rank or max(ranks)
    else:
        rank = ranks[0]
        if len(set(ranks)) > 1:
            found = ", ".join(f'"{m.name}" has {r}' for m, r in zip(members, ranks))
            raise ConfigError(
                f'combination_type="{recipe.combination_type}" needs adapters of one rank, but {found}; '
                'use "cat" (exact, the ranks add up) or "svd" (the best approximation of rank svd_rank)'
            )
    fields = {"r": rank, "lora_alpha": rank, "use_rslora": False, "init_lora_weights": True}
    return dataclasses.replace(united, **fields, rank_pattern={}, alpha_pattern={})


def values(base: Any, members: list[Member], recipe: Recipe, new: Any) -> Values:
    """The values of both factors at every module that a member adapts."""
    found: Values = {}
    adapted = [(member.tree.adapted(), member.weight) for member in members]
    for path in dict.fromkeys(path for adapters, _ in adapted for path in adapters):
        view = view_of(base.get_submodule(path))
        if reason := view.compose_fault():
            raise UsageError(f"{path}: {reason}, so adapters on it cannot be combined")
        loras = [(adapters[path], weight) for adapters, weight in adapted if path in adapters]
        with torch.no_grad():
            a, b = _combined(loras, recipe, new.r)
        found[path] = {"lora_A": a, "lora_B": b}
    return found


def _combined(loras: list[tuple[Any, float]], recipe: Recipe, rank: int) -> tuple[Tensor, Tensor]:
    """A and B of the combination at one module.

    A factor of a kernel or a table has more, or other, dimensions than `(r, in)` and `(out, r)`, but it always has its
    rank first in A and second in B, so flattened behind the first dimension any two of them multiply to the change.
    """
    all_a = [lora.lora_A.float() for lora, _ in loras]  # each (r, in, ...)
    all_b = [lora.lora_B.float() for lora, _ in loras]  # each (out, r, ...)
    strengths = [weight * lora.scale for lora, weight in loras]
    if not recipe.on_whole_changes and recipe.combination_type != "cat":
        # B A takes the root of a strength on either side; its sign goes to one side, or it would be lost
        roots = [math.sqrt(abs(strength)) for strength in strengths]
        signed = [math.copysign(root, strength) for root, strength in zip(roots, strengths)]
        pruned_a = [padded(recipe.prune(a), rank, 0) for a in all_a]
        pruned_b = [padded(recipe.prune(b), rank, 1) for b in all_b]
        return recipe.sum(pruned_a, signed), recipe.sum(pruned_b, roots)
    side_by_side = torch.cat([a * s for a, s in zip(all_a, strengths)]), torch.cat(all_b, dim=1)
    if recipe.combination_type == "cat":
        return padded(side_by_side[0], rank, 0), padded(side_by_side[1], rank, 1)
    if not recipe.prunes and recipe.svd_clamp is None:
        a, b = factors_of_product(side_by_side[0].flatten(1), side_by_side[1].flatten(1), rank)
    else:
        changes = [lora.scale * (b.flatten(1) @ a.flatten(1)) for (lora, _), a, b in zip(loras, all_a, all_b)]  # (out, in)
        change = recipe.sum([recipe.prune(change) for change in changes], [weight for _, weight in loras])
        a, b = factors_of(change, rank, recipe.svd_clamp, **recipe.svd_options)
    return a.reshape(rank, *all_a[0].shape[1:]), b.reshape(-1, rank, *all_b[0].shape[2:])
