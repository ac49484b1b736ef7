"""Handles to folders."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save_file
from torch import Tensor

from ..registry import adapter_type
from .card import card_text
from .files import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, config_text, write_folder
from .names import named_tensors

if TYPE_CHECKING:
    from ..model import PeftModel


def write(
    handle: PeftModel, names: list[str], directory: str, gathered: dict[str, Tensor] | None, is_main: bool = True
) -> None:
    """Write the named adapters: `default` into `directory`, others into folders of their names.

    Gathering a sharded handle is collective, so ranks that do not write (`is_main=False`) take part in it, too.
    """
    for name in names:
        config, values = handle.peft_config[name], tensors(handle, name, gathered)
        if not is_main:
            continue
        folder = Path(directory) if name == "default" else Path(directory) / name
        writers: dict[str, Callable[[Path], object]] = {
            WEIGHTS_FILE: partial(save_file, values, metadata={"format": "pt"}),
            CONFIG_FILE: partial(_write_text, config_text(config)),
        }
        if not (folder / CARD_FILE).exists():
            writers[CARD_FILE] = partial(_write_text, card_text(config))
        write_folder(folder, writers)


def _write_text(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")


def tensors(handle: PeftModel, name: str, gathered: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """`{name in file: tensor}`, from gathered values where a sharded handle's are given."""
    found = {}
    config = handle.peft_config[name]
    for in_file, in_tree, tensor in named_tensors(handle.tree(name), config, handle.base_model):
        value = (gathered or {}).get(f"adapters.{name}.{in_tree}", tensor).detach()
        if hasattr(value, "full_tensor"):  # a DTensor of a sharded handle; every rank takes part
            value = value.full_tensor()
        value = adapter_type(config).saved(in_file, value, config)
        found[in_file] = value.cpu().contiguous().clone()
    return found
