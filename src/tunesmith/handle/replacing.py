"""One adapter in the place of another: which tensors stay the same objects."""

from __future__ import annotations

import dataclasses

import torch

from ..attach.tree import AdapterTree
from ..config import PeftConfig

# Fields that say where an adapter comes from and who uses it, not what it computes.
_ABOUT = ("task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode")


def alike(old: AdapterTree, before: PeftConfig, new: AdapterTree, config: PeftConfig) -> bool:
    """Whether two adapters differ in the values of their tensors alone."""
    if type(before) is not type(config):
        return False
    fields = (field.name for field in dataclasses.fields(config) if field.name not in _ABOUT)
    return _shapes(old) == _shapes(new) and all(getattr(before, name) == getattr(config, name) for name in fields)


def take_values(old: AdapterTree, new: AdapterTree) -> None:
    """Copy the tensors of an adapter into one that is alike."""
    values = new.state_dict()
    with torch.no_grad():
        for name, tensor in old.state_dict(keep_vars=True).items():
            tensor.copy_(values[name])


def keep_parameters(old: AdapterTree, new: AdapterTree) -> int:
    """Let `new` use those parameters of `old` that have the same name, shape and type, with the new values.

    Returns:
        How many parameters of `new` are none of `old`.
    """
    before, lost = dict(old.named_parameters()), 0
    for path, module in new.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is None:
                continue
            kept = before.get(f"{path}.{leaf}")
            if kept is None or (kept.shape, kept.dtype) != (parameter.shape, parameter.dtype):
                lost += 1
                continue
            with torch.no_grad():
                kept.copy_(parameter)
            module._parameters[leaf] = kept
    return lost


def _shapes(tree: AdapterTree) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tree.state_dict().items()}
