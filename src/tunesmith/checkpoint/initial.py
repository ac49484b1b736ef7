"""An adapter that started from parts of the weights (PiSSA, OLoRA), written as a plain LoRA of twice the rank.

    y = W x + s (B A - B0 A0) x = W x + s [B, -B0] [A; A0] x

Any reader of plain LoRA files computes the same then, on the base as it is. The scale `s` stays what it was: alpha grows
with the rank (rsLoRA: with its root), in the patterns, too.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from ..attach.tree import AdapterTree
from ..config import PeftConfig
from ..errors import AdapterFileError, UsageError, bullet_list
from ..methods.lora import Lora
from ..methods.lora_config import LoraConfig
from ..methods.lora_from_weight import LoraFromWeight
from ..storage.folder import AdapterFolder

Values = dict[str, Tensor]  # by their names in files


def as_plain_lora(tree: AdapterTree, config: PeftConfig, values: Values, start: AdapterFolder) -> tuple[PeftConfig, Values]:
    """Configuration and tensors of the plain LoRA that computes what an adapter does.

    Args:
        values: the adapter's.
        start: the adapter as it was before training.

    Raises:
        UsageError: the adapter is not made of factors alone.
        AdapterFileError: `start` is not what it started as.
    """
    if not isinstance(config, LoraConfig) or any(type(each) not in (Lora, LoraFromWeight) for each in tree.adapted().values()):
        raise UsageError(
            f"path_initial_model_for_weight_conversion is for LoRA of two factors, not for {config.method}"
            f"{' with use_dora' if getattr(config, 'use_dora', False) else ''}; leave it out"
        )
    if config.target_parameters or any(getattr(each, "difference", None) is not None for each in tree.adapted().values()):
        reason = "target_parameters" if config.target_parameters else "LoftQ, whose change of the weight has full rank,"
        raise UsageError(f"path_initial_model_for_weight_conversion: {reason} cannot be written as a plain LoRA; leave it out")
    before, found, faults = start.tensors(), dict(values), []
    for path, adapter in tree.adapted().items():
        name_a, name_b = _names(path, adapter)
        stored = before.get(name_a), before.get(name_b)
        initial = _subtracted(adapter, values[name_a], values[name_b])
        if not _have_one_product(stored, initial):
            faults.append(path)
            continue
        found[name_a] = torch.cat([values[name_a], initial[0]])  # (2 r, in, ...)
        found[name_b] = torch.cat([values[name_b], -initial[1]], dim=1)  # (out, 2 r, ...)
    if faults:
        raise AdapterFileError(
            f'"{start.name}" is not what this adapter started as; give the folder that it was saved in before its training. '
            "It differs at:\n" + bullet_list(faults)
        )
    return _doubled(config), found


def _names(path: str, adapter: Any) -> tuple[str, str]:
    """What files call the two factors at a module."""
    names = {id(tensor): name for name, tensor in adapter.in_file(beside=False).items()}
    return f"base_model.model.{path}.{names[id(adapter.lora_A)]}", f"base_model.model.{path}.{names[id(adapter.lora_B)]}"


def _subtracted(adapter: Any, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The factors whose product the adapter's forward takes off again, in the type of `a`; nothing for a plain LoRA."""
    if not isinstance(adapter, LoraFromWeight):
        return torch.zeros_like(a), torch.zeros_like(b)
    assert adapter.init_A is not None and adapter.init_B is not None
    return adapter.init_A.to(a), adapter.init_B.to(b)


def _have_one_product(stored: tuple[Tensor | None, Tensor | None], initial: tuple[Tensor, Tensor]) -> bool:
    """Whether the stored factors, perhaps rounded to 16 bits, stand for the same change as those that the adapter has."""
    a, b = stored
    if a is None or b is None or a.shape != initial[0].shape or b.shape != initial[1].shape:
        return False
    a, b, size = a.float().flatten(1), b.float().flatten(1), a.float().norm() * b.float().norm()
    distance = b @ a - initial[1].float().flatten(1) @ initial[0].float().flatten(1)
    return bool(distance.norm() <= 1e-2 * size)


def _doubled(config: LoraConfig) -> LoraConfig:
    by = math.sqrt(2) if config.use_rslora else 2
    return dataclasses.replace(
        config,
        init_lora_weights=True,
        r=2 * config.r,
        lora_alpha=by * config.lora_alpha,
        rank_pattern={key: 2 * r for key, r in (config.rank_pattern or {}).items()},
        alpha_pattern={key: by * alpha for key, alpha in (config.alpha_pattern or {}).items()},
    )
