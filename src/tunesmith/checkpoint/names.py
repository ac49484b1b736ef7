"""Names of tensors in adapter files.

The ecosystem's files prefix the base's module path with `base_model.model.` (module adapters) and hold one tensor
`prompt_embeddings` for methods with virtual tokens. The adapter's own name is not in them.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from ..attach.tree import AdapterTree
from ..config import PeftConfig

IN_BASE = "base_model.model."  # before a path of the base
_ENCODER = "encoder."  # of a prompt adapter

# Suffixes in older files, and the current ones.
_OLDER = {"lora_magnitude_vector.weight": "lora_magnitude_vector"}
# What torch.compile, FSDP and checkpoint wrappers put into the names of a model that is saved inside them.
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def current_name(key: str) -> str:
    """The current name of a tensor, which may come from an older file or out of a wrapped model."""
    for wrapper in _WRAPPERS:
        key = key.replace(wrapper, "")
    return next((key.removesuffix(old) + new for old, new in _OLDER.items() if key.endswith(old)), key)


def prefix_of(config: PeftConfig) -> str:
    """What the path of a module of the base follows in a tensor's name."""
    return "base_model." if config.is_prompt_learning else IN_BASE


def named_tensors(tree: AdapterTree, config: PeftConfig, base: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """`(name in files, name in the tree, tensor)` of everything the adapter owns."""
    prefix = prefix_of(config)
    owned = {tensor: name for name, tensor in tree.state_dict(keep_vars=True).items()}
    if tree.prompt is not None:
        for name, tensor in tree.prompt.state_dict(keep_vars=True).items():
            if name.startswith(_ENCODER):
                continue  # these have their own file; see encoder_tensors
            yield ("prompt_embeddings" if name == "embedding" else name), owned[tensor], tensor
    if tree.shared is not None:
        for name, tensor in tree.shared.state_dict(keep_vars=True).items():
            yield f"base_model.{name}", owned[tensor], tensor
    for path, adapter in tree.items():
        beside = tree.node(path).own not in (None, adapter)
        for name, tensor in adapter.in_file(beside).items():
            yield f"{prefix}{path}.{name}", owned[tensor], tensor


def second_names(tree: AdapterTree) -> set[str]:
    """Names in files of tensors that stand there a second time, transposed."""
    return {f"base_model.model.{path}.{name}" for path, adapter in tree.items() for name in adapter.second_names()}


def encoder_tensors(tree: AdapterTree) -> Iterator[tuple[str, str, Tensor]]:
    """`(name in the encoder's file, name in the tree, tensor)` of what computes virtual tokens while they are trained."""
    if tree.prompt is not None:
        for name, tensor in tree.prompt.state_dict(keep_vars=True).items():
            if name.startswith(_ENCODER):
                yield name.removeprefix(_ENCODER), f"_prompt.{name}", tensor
