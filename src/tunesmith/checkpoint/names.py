"""Names of tensors in adapter files.

The ecosystem's files prefix the base's module path with `base_model.model.` (module adapters) and hold one tensor
`prompt_embeddings` for methods with virtual tokens. The adapter's own name is not in them.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from ..adapter import ModuleCopy, ParameterAdapter
from ..attach.tree import AdapterTree
from ..config import PeftConfig
from ..methods.lora_parameters import LoraParameters
from ..methods.trainable_tokens import TokenRows

# Local tensor names whose name in files is not the plain `<path>.<name>`, by method.
_SUFFIXES = {
    "LORA": {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_B_bias": "lora_B.bias"},
    "OFT": {"oft_R": "oft_R.weight"},
}
_EMBEDDING = {
    "LORA": {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"},
    "OFT": {"oft_R": "oft_embedding_R.weight"},
}
_ENCODER = "encoder."  # of a prompt adapter

# Endings that older files have, and what they are now.
_OLDER = {"lora_magnitude_vector.weight": "lora_magnitude_vector"}


def todays_name(key: str) -> str:
    """The name that a tensor of an older file has in today's."""
    return next((key.removesuffix(old) + new for old, new in _OLDER.items() if key.endswith(old)), key)


def named_tensors(tree: AdapterTree, config: PeftConfig, base: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """`(name in files, name in the tree, tensor)` of everything the adapter owns."""
    prefix = "base_model." if config.is_prompt_learning else "base_model.model."
    owned = {tensor: name for name, tensor in tree.state_dict(keep_vars=True).items()}
    if tree.prompt is not None:
        for name, tensor in tree.prompt.state_dict(keep_vars=True).items():
            if name.startswith(_ENCODER):
                continue  # in a file of their own; see encoder_tensors
            yield ("prompt_embeddings" if name == "embedding" else name), owned[tensor], tensor
    if tree.shared is not None:
        for name, tensor in tree.shared.state_dict(keep_vars=True).items():
            yield f"base_model.{name}", owned[tensor], tensor
    for path, adapter in tree.items():
        module = base.get_submodule(path)
        own = tree.node(path).own  # another one is a bias or a copy beside it
        for name, tensor in adapter.state_dict(keep_vars=True).items():
            yield f"{prefix}{path}.{_in_file(name, adapter, module, config, own)}", owned[tensor], tensor
        if isinstance(adapter, TokenRows) and adapter.owner is not adapter and config.method == "TRAINABLE_TOKENS":
            tensor = adapter.owner.trainable_tokens_delta  # a second name of the same rows
            yield f"{prefix}{path}.trainable_tokens_delta", owned[tensor], tensor


def encoder_tensors(tree: AdapterTree) -> Iterator[tuple[str, str, Tensor]]:
    """`(name in the encoder's file, name in the tree, tensor)` of what computes virtual tokens while they are trained."""
    if tree.prompt is not None:
        for name, tensor in tree.prompt.state_dict(keep_vars=True).items():
            if name.startswith(_ENCODER):
                yield name.removeprefix(_ENCODER), f"_prompt.{name}", tensor


def _in_file(name: str, adapter: nn.Module, module: nn.Module, config: PeftConfig, own: nn.Module | None) -> str:
    if isinstance(adapter, ModuleCopy):
        return name.removeprefix("module.")
    if isinstance(adapter, TokenRows):
        return name if config.method == "TRAINABLE_TOKENS" else f"token_adapter.{name}"
    if isinstance(adapter, LoraParameters):
        parameter, _, leaf = name.rpartition(".")
        nested = "base_layer." * (len(adapter.names) - 1 - adapter.names.index(parameter))  # the last one is outermost
        return f"{nested}{leaf}.weight"
    if isinstance(adapter, ParameterAdapter):
        if adapter is own:
            return f"ln_tuning_layers.{name}" if config.method == "LN_TUNING" else name
        return name if own is None else f"base_layer.{name}"
    table = _EMBEDDING if isinstance(module, nn.Embedding) else _SUFFIXES
    return table.get(config.method or "", {}).get(name, name)
