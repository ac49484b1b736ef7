"""Adapters of another vocabulary than the base's: tokens were added before or after training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..attach.plan import Plan
from .names import IN_BASE

Tensors = dict[str, Tensor]


def of_base(base: Any) -> dict[str, Any]:
    """`{path: module}` of the base's modules with a row for each token: its input embeddings and its output head."""
    found = []
    for get in ("get_input_embeddings", "get_output_embeddings"):
        try:
            found.append(getattr(base, get)())
        except (AttributeError, NotImplementedError):  # models of images, of audio
            continue
    return {path: module for path, module in base.named_modules() if any(module is one for one in found)}


def fill_up(tensors: Tensors, expected: Tensors, base: nn.Module, plan: Plan) -> list[str]:
    """Give copies of fewer tokens than the base has the base's own rows for the others; a sentence on each."""
    notes = []
    for path in of_base(base).keys() & set(plan.copied):
        for key in (f"{IN_BASE}{path}.{name}" for name in ("weight", "bias")):
            stored, own = tensors.get(key), expected.get(key)
            if stored is None or own is None or stored.dim() != own.dim() or stored.shape[1:] != own.shape[1:]:
                continue
            if len(stored) < len(own):
                tensors[key] = torch.cat([stored, own[len(stored) :].detach().to(stored)])
                notes.append(f"{key} holds {len(stored)} tokens, the base has {len(own)}; the others keep the base's rows")
    return sorted(notes)


def advice(tensors: Tensors, expected: Tensors, base: nn.Module) -> str | None:
    """What to do where tensors fail to fit because the vocabulary has another size; None where that is not the reason."""
    sizes = {module.weight.shape[0] for module in of_base(base).values()}
    for key in expected.keys() & tensors.keys():
        for found, wanted in zip(tensors[key].shape, expected[key].shape):
            if found != wanted and wanted in sizes:
                return (
                    f"it was made for a vocabulary of {found} tokens and the base has {wanted}; "
                    f"call base.resize_token_embeddings({found}) before loading it"
                )
    return None
