"""Loads adapters from folders: everything is checked before the first value is copied."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..attach.plan import Plan
from ..attach.tree import AdapterTree
from ..config import PeftConfig, PromptConfig
from ..errors import AdapterFileError, bullet_list, did_you_mean
from ..storage.folder import ENCODER_FILE, AdapterFolder
from . import vocabulary
from .names import IN_BASE, current_name, encoder_tensors, named_tensors, second_names
from .save import materialize

logger = logging.getLogger(__name__)


class LoadResult(NamedTuple):
    """What a file does not hold of what its configuration says, under the names that readers of the ecosystem use.

    Args:
        missing_keys: paths of targeted modules of which the file holds nothing; they carry no adapter.
        unexpected_keys: always empty, because a tensor that belongs to nothing is an error.
    """

    missing_keys: list[str]
    unexpected_keys: list[str]


@dataclass
class Stored:
    """An adapter's files, read.

    Args:
        config: what it is said to be.
        tensors: by their current names.
    """

    folder: AdapterFolder
    config: PeftConfig
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, folder: AdapterFolder, config: PeftConfig) -> Stored:
        return cls(folder, config, {current_name(key): tensor for key, tensor in folder.tensors().items()})

    def paths(self, base: nn.Module) -> set[str]:
        """Paths of the base's modules that own a tensor of the file."""
        modules = {path for path, _ in base.named_modules()}
        return {_owner(key, modules) for key in self.tensors}


def _owner(key: str, modules: Collection[str]) -> str:
    """The innermost module to whose path the name of a tensor leads."""
    path = key.removeprefix(IN_BASE)
    while path not in modules:
        path = path.rpartition(".")[0]
    return path


def into(tree: AdapterTree, config: PeftConfig, stored: Stored, base: nn.Module, plan: Plan) -> LoadResult:
    """Copy a file's tensors into an adapter built from its configuration; what the configuration says beyond them is one
    warning.

    Raises:
        AdapterFileError: missing, unknown or misshapen tensors, wrong dtypes or values that are not finite, all of them
            at once; nothing is then copied.
    """
    folder, tensors = stored.folder, dict(stored.tensors)
    expected = {in_file: tensor for in_file, _, tensor in named_tensors(tree, config, base)}
    encoder = {in_file: tensor for in_file, _, tensor in encoder_tensors(tree)}
    faults, notes = [], list(plan.unmatched)
    if encoder:
        tokens, encoder_stored = tensors.pop("prompt_embeddings", None), folder.encoder_tensors()
        if not folder.holds_encoder():
            faults = [f"{ENCODER_FILE} is missing; load the adapter under another name to do without it"]
        else:
            faults = _differences(encoder_stored, encoder) or _belongs(tree.prompt, encoder_stored, tokens)
    tensors = _without_copies_of_the_base(tensors, expected, base)
    for key in second_names(tree) & tensors.keys():
        if any(torch.equal(tensors[key], other.T) for other in tensors.values() if other.dim() == 2):
            del tensors[key]
    notes += vocabulary.fill_up(tensors, expected, base, plan)
    faults += _differences(tensors, expected)
    if faults:
        advice = vocabulary.advice(tensors, expected, base) or "use the base it was made for, or download or save it again"
        raise AdapterFileError(
            f'"{folder.name}"{made_for(config)} does not fit {type(base).__name__}, so nothing was loaded; {advice}:\n'
            + bullet_list(sorted(faults) + notes)
        )
    with torch.no_grad():
        for key, tensor in expected.items():
            tensor.copy_(tensors[key])
        for key, tensor in encoder.items():
            tensor.copy_(encoder_stored[key])
    if plan.absent:
        notes.append("the file holds nothing for these targets, so they carry no adapter: " + ", ".join(plan.absent))
    if notes:
        logger.warning(
            '"%s"%s was loaded, and every tensor has its place, but its configuration says more:\n%s',
            folder.name,
            made_for(config),
            bullet_list(notes),
        )
    return LoadResult(list(plan.absent), [])


def is_materialized(config: PeftConfig, folder: AdapterFolder) -> bool:
    """Whether to build an adapter from `folder` without the encoder of its virtual tokens."""
    if config.inference_mode or not isinstance(config, PromptConfig) or not config.trains_encoder:
        return True
    if not folder.holds_encoder():
        logger.warning(
            '"%s" holds virtual tokens without the encoder that computed them; training continues with the tokens themselves',
            folder.name,
        )
        return True
    return False


def _differences(stored: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """A sentence for each tensor that is missing, unknown or of another shape or dtype."""
    faults = [f'"{key}" is missing' for key in expected if key not in stored]
    faults += [
        f'"{key}" belongs to no part of the adapter{did_you_mean(key, expected)}' for key in stored if key not in expected
    ]
    for key in expected.keys() & stored.keys():
        faults += _faults(key, stored[key], expected[key])
    return faults


def _belongs(prompt: Any, stored: dict[str, Tensor], tokens: Tensor | None) -> list[str]:
    """An encoder that does not compute the tokens beside it is left over from another adapter."""
    if tokens is None:
        return ['"prompt_embeddings" is missing']
    device = next(prompt.encoder.parameters()).device
    made = materialize(prompt.encoder, {name: value.to(device) for name, value in stored.items()}).cpu()
    tolerance = 1e-2 * made.abs().max().item()  # room for another device's rounding, or for tokens kept in 16 bits
    if made.shape == tokens.shape and torch.allclose(made.float(), tokens.float(), rtol=0, atol=tolerance):
        return []
    return [f"{ENCODER_FILE} does not compute the virtual tokens beside it; delete it to train the tokens alone"]


def made_for(config: PeftConfig) -> str:
    """` (made for "<base>")`, or nothing if the file names no base."""
    return f' (made for "{config.base_model_name_or_path}")' if config.base_model_name_or_path else ""


def _faults(key: str, found: Tensor, expected: Tensor) -> list[str]:
    if found.shape != expected.shape:
        return [f'"{key}" has the shape {tuple(found.shape)}, the base needs {tuple(expected.shape)}']
    if found.is_floating_point() != expected.is_floating_point():
        return [f'"{key}" holds {found.dtype}, expected a dtype like {expected.dtype}']
    if found.is_floating_point() and not torch.isfinite(found.to(expected.dtype)).all():
        return [f'"{key}" holds values that are not finite (NaN or infinity) in {expected.dtype}']
    return []


def _without_copies_of_the_base(stored: dict[str, Tensor], expected: dict[str, Tensor], base: nn.Module) -> dict[str, Tensor]:
    """Leave out what some writers add: second names of copied modules' biases, and frozen weights equal to this base's."""
    kept = {key: tensor for key, tensor in stored.items() if not _is_second_name(key, stored)}
    for key, tensor in list(kept.items()):
        path, _, leaf = key.removeprefix(IN_BASE).rpartition(".")
        path = path.removesuffix(".base_layer")
        if key in expected or leaf != "weight" or not isinstance(_submodule(base, path), nn.Embedding | nn.Linear):
            continue
        own = _submodule(base, path).weight
        if own.shape == tensor.shape and torch.allclose(own.to(tensor.dtype), tensor.to(own.device), rtol=1e-2, atol=1e-5):
            del kept[key]
    return kept


def _is_second_name(key: str, stored: dict[str, Tensor]) -> bool:
    return any(mark in key and key.replace(mark, ".") in stored for mark in (".modules_to_save.", ".original_module."))


def _submodule(base: nn.Module, path: str) -> Any:
    try:
        return base.get_submodule(path)
    except AttributeError:
        return None
