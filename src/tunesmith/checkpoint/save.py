"""Saves the adapters of a handle in folders."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..config import config_text
from ..handle.state import HandleState
from ..registry import adapter_type
from ..storage.folder import CARD_FILE, CONFIG_FILE, ENCODER_FILE, WEIGHTS_FILE, write_folder, write_text
from .card import card_text
from .names import encoder_tensors, named_tensors


def write(
    handle: HandleState, names: list[str], directory: str, gathered: dict[str, Tensor] | None, is_main: bool = True
) -> None:
    """Write the named adapters: `default` into `directory`, others into subfolders named after them.

    Gathering a sharded handle is collective, so ranks that do not write (`is_main=False`) take part in it, too.
    """
    for name in names:
        config, values, encoder = handle.peft_config[name], tensors(handle, name, gathered), _encoder(handle, name, gathered)
        if not is_main:
            continue
        folder = Path(directory) if name == "default" else Path(directory) / name
        writers: dict[str, Callable[[Path], object]] = {
            WEIGHTS_FILE: partial(save_file, values, metadata={"format": "pt"}),
            CONFIG_FILE: partial(write_text, config_text(config)),
        }
        if not (folder / CARD_FILE).exists():
            writers[CARD_FILE] = partial(write_text, card_text(config))
        if encoder:
            writers[ENCODER_FILE] = partial(save_file, _on_cpu(encoder), metadata={"format": "pt"})
        write_folder(folder, writers)
        if not encoder:
            (folder / ENCODER_FILE).unlink(missing_ok=True)  # from an adapter that was saved here before


def tensors(handle: HandleState, name: str, gathered: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """`{name in file: tensor}`, from the gathered values of a sharded handle if they are given."""
    found = {}
    config = handle.peft_config[name]
    for in_file, in_tree, tensor in named_tensors(handle.tree(name), config, handle.bare_base):
        value = _whole(f"adapters.{name}.{in_tree}", tensor, gathered)
        found[in_file] = adapter_type(config).saved(in_file, value, config)
    prompt = handle.tree(name).prompt
    if prompt is not None and prompt.encoder is not None:
        found["prompt_embeddings"] = materialize(prompt.encoder, _encoder(handle, name, gathered))
    return _on_cpu(found)


def materialize(encoder: nn.Module, values: dict[str, Tensor]) -> Tensor:
    """The virtual tokens that `encoder` computes with `values` as its tensors, without dropout."""
    was_training = encoder.training
    encoder.eval()
    try:
        with torch.no_grad():
            return torch.func.functional_call(encoder, values, ())
    finally:
        encoder.train(was_training)


def _encoder(handle: HandleState, name: str, gathered: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """`{name in the encoder's file: tensor}`; empty if virtual tokens are trained directly."""
    return {
        in_file: _whole(f"adapters.{name}.{in_tree}", tensor, gathered)
        for in_file, in_tree, tensor in encoder_tensors(handle.tree(name))
    }


def _whole(in_handle: str, tensor: Tensor, gathered: dict[str, Tensor] | None) -> Tensor:
    """The tensor's whole value; for a sharded handle, every rank takes part."""
    value: Any = (gathered or {}).get(in_handle, tensor).detach()
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _on_cpu(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cpu().contiguous().clone() for name, value in values.items()}
