"""Saves the adapters of a handle in folders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..config import PeftConfig, config_text
from ..errors import ConfigError
from ..handle.state import HandleState
from ..registry import adapter_type
from ..storage.folder import (
    CARD_FILE,
    CONFIG_FILE,
    ENCODER_FILE,
    OLD_WEIGHTS_FILE,
    WEIGHTS_FILE,
    AdapterFolder,
    write_folder,
    write_text,
)
from . import embeddings, given, initial
from .card import card_text


@dataclass(frozen=True)
class Request:
    """What a caller of `save_pretrained` asks for.

    Args:
        state_dict: the values to write; None writes the handle's own.
        embeddings: whether to write the base's embeddings, too; "auto" where the base alone would not give them back.
        initial: folder of the adapter as it was before training, to write a plain LoRA instead.
        pickled: what writes tensors in the old format, `(tensors, path)`; None writes safetensors.
        is_main: this process writes; others only take part in gathering sharded values.
    """

    state_dict: Mapping[str, Any] | None = None
    embeddings: embeddings.Choice = "auto"
    initial: str | None = None
    pickled: Callable[[dict[str, Tensor], Any], object] | None = None
    is_main: bool = True

    def __post_init__(self) -> None:
        if self.embeddings not in (True, False, "auto"):
            raise ConfigError(f'save_embedding_layers={self.embeddings!r} must be True, False or "auto"')


def write(handle: HandleState, names: list[str], directory: str, request: Request) -> None:
    """Write the named adapters: `default` into `directory`, others into subfolders named after them.

    Everything is gathered and checked before the first file is written. Gathering a sharded handle is collective, so ranks
    that do not write take part in it, too.
    """
    start = None if request.initial is None else AdapterFolder.find(request.initial)
    contents = {name: _content(handle, name, request) for name in names}
    if not request.is_main:
        return
    if start is not None:
        for name, (config, values, encoder) in contents.items():
            contents[name] = (*initial.as_plain_lora(handle.tree(name), config, values, start), encoder)
    for name, content in contents.items():
        _write_one(Path(directory) if name == "default" else Path(directory) / name, content, request.pickled)


Content = tuple[PeftConfig, dict[str, Tensor], dict[str, Tensor]]  # configuration, tensors, tensors of an encoder


def _content(handle: HandleState, name: str, request: Request) -> Content:
    values = tensors(handle, name, request)
    return handle.peft_config[name], values, _on_cpu(_encoder(handle, name, request))


def _write_one(folder: Path, content: Content, pickled: Callable[..., object] | None) -> None:
    """Write one adapter's files, and remove those of an adapter that was saved here before and that readers would take."""
    config, values, encoder = content
    as_safetensors: dict[str, Any] = {"metadata": {"format": "pt"}}
    writers: dict[str, Callable[[Path], object]] = {
        CONFIG_FILE: partial(write_text, config_text(config)),
        **({WEIGHTS_FILE: partial(save_file, values, **as_safetensors)} if pickled is None else {}),
        **({OLD_WEIGHTS_FILE: partial(pickled, values)} if pickled is not None else {}),
        **({ENCODER_FILE: partial(save_file, encoder, **as_safetensors)} if encoder else {}),
    }
    if not (folder / CARD_FILE).exists():
        writers[CARD_FILE] = partial(write_text, card_text(config))
    write_folder(folder, writers, removed={WEIGHTS_FILE, OLD_WEIGHTS_FILE, ENCODER_FILE} - writers.keys())


def tensors(handle: HandleState, name: str, request: Request) -> dict[str, Tensor]:
    """`{name in file: tensor}` of one adapter, copied to the CPU.

    Raises:
        AdapterFileError: values are missing, or only parts of them are here.
    """
    config, prompt = handle.peft_config[name], handle.tree(name).prompt
    wanted = {**given.wanted(handle, name), **embeddings.written(handle, name, request.embeddings)}
    values = _values(handle, name, wanted, request)
    found = {in_file: adapter_type(config).saved(in_file, value, config) for in_file, value in values.items()}
    if prompt is not None and prompt.encoder is not None:
        encoder = _encoder(handle, name, request)
        if request.is_main:
            found["prompt_embeddings"] = materialize(prompt.encoder, encoder)
    return _on_cpu(found)


def _encoder(handle: HandleState, name: str, request: Request) -> dict[str, Tensor]:
    """`{name in the encoder's file: tensor}`; empty if virtual tokens are trained directly."""
    return _values(handle, name, given.wanted_of_encoder(handle, name), request)


def _values(handle: HandleState, name: str, wanted: dict[str, given.Wanted], request: Request) -> dict[str, Tensor]:
    held, alone = request.state_dict, len(handle.peft_config) == 1
    keys = {} if held is None else given.keys_of(wanted, held.keys(), name, alone)
    return given.whole(wanted, held, keys, check=request.is_main)


def materialize(encoder: nn.Module, values: dict[str, Tensor]) -> Tensor:
    """The virtual tokens that `encoder` computes with `values` as its tensors, without dropout."""
    was_training = encoder.training
    encoder.eval()
    try:
        with torch.no_grad():
            return torch.func.functional_call(encoder, values, ())
    finally:
        encoder.train(was_training)


def _on_cpu(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cpu().contiguous().clone() for name, value in values.items()}
