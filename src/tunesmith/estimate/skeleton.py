"""A base model's skeleton: its class and shapes on the meta device, by name, folder or config file. Nothing is downloaded for
the models of `models.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..assets import resolve
from ..errors import UsageError, did_you_mean

KNOWN = Path(__file__).with_name("models.json")


def known_models() -> dict[str, dict[str, Any]]:
    """Shapes of widely used models, by name."""
    found: dict[str, dict[str, Any]] = json.loads(KNOWN.read_text(encoding="utf-8"))
    return found


def config_of(name: str) -> Any:
    """The configuration of a base: a known name (with or without its owner), a folder, a config file, or a Hub id.

    Raises:
        UsageError: there is none, or the Hub cannot be reached.
    """
    import transformers

    path, table = Path(resolve(name)), known_models()
    if path.is_file():
        return _of_values(json.loads(path.read_text(encoding="utf-8")), name)
    if not path.is_dir():
        for known, values in table.items():
            if known.lower() in (name.lower(), _plain(name)):
                return _of_values(values, name)
    try:
        return transformers.AutoConfig.from_pretrained(resolve(name))
    except (OSError, ValueError) as error:
        near = did_you_mean(_plain(name), table)
        raise UsageError(
            f'"{name}" is not a folder with a config.json, cannot be fetched from the Hub, and is not a known name'
            + (near or f"; known names: {', '.join(table)}")
        ) from error


def _plain(name: str) -> str:
    """`meta-llama/Llama-2-7b-chat-hf` has the shapes of `llama-2-7b`."""
    last = name.rsplit("/", 1)[-1].lower()
    for ending in ("-hf", "-instruct", "-chat", "-v0.1", "-v0.2", "-v0.3", "-it"):
        last = last.replace(ending, "")
    return last.replace("meta-", "")


def _of_values(values: dict[str, Any], name: str) -> Any:
    import transformers

    if "model_type" not in values:
        raise UsageError(f'{name} has no "model_type", so the architecture is unknown')
    try:
        return transformers.AutoConfig.for_model(**values)
    except (ValueError, TypeError) as error:
        raise UsageError(f"{name} does not describe a model that transformers knows ({error})") from error


def skeleton(config: Any, dtype: Any) -> Any:
    """The model of a configuration, on the meta device.

    Raises:
        UsageError: it is not a language model.
    """
    import torch
    import transformers

    from ..bases import architecture  # needs torch, which the names of models do not

    auto = getattr(transformers, architecture.auto_class(config))
    try:
        with torch.device("meta"):
            return auto.from_config(config, dtype=dtype)
    except ValueError as error:
        kind = architecture.model_type(config)
        raise UsageError(f"models of type {kind} are not language models and cannot be planned") from error
