"""Exports an adapter for other tools: safetensors of one dtype, in a folder that the ecosystem's tools read."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..config import config_text, read_config
from ..errors import ConfigError
from ..storage.folder import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, AdapterFolder, write_folder, write_text
from .card import card_text

OURS = {"BOTTLENECK", "BITFIT"}  # methods that only Tunesmith has (docs/formats.md)


def export_adapter(name_or_path: str, folder: Path, dtype: torch.dtype | None = None) -> int:
    """Write an adapter as the ecosystem reads it, without its base; returns the bytes of its tensors.

    Args:
        dtype: of floating-point tensors; None keeps theirs.

    Raises:
        AdapterFileError: its files are missing or damaged, or the folder cannot be written.
        ConfigError: other tools do not know its method, or a value is too large for `dtype`.
    """
    adapter = AdapterFolder.find(name_or_path)
    config, tensors = read_config(adapter), adapter.tensors()
    method = str(getattr(config.peft_type, "value", config.peft_type))
    if method in OURS:
        raise ConfigError(f"{name_or_path} uses {method}, which other tools do not have; merge it, or use it with Tunesmith")
    lost = []
    for name, tensor in tensors.items():
        if dtype is None or not tensor.is_floating_point():
            continue
        tensors[name] = tensor.to(dtype)
        if not torch.isfinite(tensors[name]).all() and torch.isfinite(tensor).all():
            lost.append(name)
    if lost:
        raise ConfigError(f"{len(lost)} tensors hold values too large for {dtype} ({lost[0]}); export as bfloat16 or float32")
    writers: dict[str, Callable[[Path], object]] = {
        WEIGHTS_FILE: partial(save_file, {name: t.contiguous() for name, t in tensors.items()}, metadata={"format": "pt"}),
        CONFIG_FILE: partial(write_text, config_text(config)),
        CARD_FILE: partial(write_text, card_text(config)),
    }
    write_folder(folder, writers)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
