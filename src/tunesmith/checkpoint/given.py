"""Values of a handle's tensors in a dictionary that others made, under whatever names their wrappers and libraries give them.

adapters.default.model.layers.0.q_proj._adapter.lora_A                  a handle's own `state_dict()`
module._orig_mod.adapters.default...                                    the same, wrapped (DDP, torch.compile, FSDP)
base_model.model.model.layers.0.q_proj.lora_A.default.weight            peft's `state_dict()`
base_model.model.model.layers.0.q_proj.lora_A.weight                    an adapter's file
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..bases import stored_tensors
from ..errors import AdapterFileError, bullet_list
from ..handle.state import HandleState
from .names import current_name, encoder_tensors, named_tensors

_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_COPY = "modules_to_save"  # peft's name for what holds the copies of one module, by adapter


@dataclass(frozen=True)
class Wanted:
    """A tensor of a handle.

    Args:
        own: its name in the handle's `state_dict()`.
        others: the names that other libraries give it.
        now: what it is at present.
        of_base: it belongs to the base, so no adapter's name is part of its names.
        needed: a dictionary must hold it.
    """

    own: str
    others: tuple[str, ...]
    now: Tensor
    of_base: bool = False
    needed: bool = True


def wanted(handle: HandleState, name: str) -> dict[str, Wanted]:
    """The tensors of one adapter, by their names in its files."""
    tree, found = handle.tree(name), {}
    for in_file, in_tree, tensor in named_tensors(tree, handle.peft_config[name], handle.bare_base):
        others = (in_file, "prompt_encoder.embedding.weight") if in_file == "prompt_embeddings" else (in_file,)
        found[in_file] = Wanted(f"adapters.{name}.{in_tree}", others, tensor)
    return found


def wanted_of_encoder(handle: HandleState, name: str) -> dict[str, Wanted]:
    """The tensors of what computes one adapter's virtual tokens, by their names in its file."""
    found = encoder_tensors(handle.tree(name))
    return {in_file: Wanted(f"adapters.{name}.{in_tree}", (), tensor) for in_file, in_tree, tensor in found}


def keys_of(tensors: Mapping[str, Wanted], keys: Collection[str], adapter: str, alone: bool) -> dict[str, str]:
    """`{name of a wanted tensor: its key}`; the handle's own names are preferred to those of other libraries.

    Args:
        adapter: its name, which is part of most keys.
        alone: whether keys without an adapter's name can mean this one.

    Raises:
        AdapterFileError: two keys mean the same tensor.
    """
    for own in (True, False):
        by_name: dict[str, list[str]] = {}
        for key in keys:
            by_name.setdefault(_plain(key, adapter), []).append(key)
        found = {}
        for name, tensor in tensors.items():
            spellings = (tensor.own,) if own else tensor.others
            matching = [key for spelling in spellings for key in by_name.get(_plain(spelling, adapter), ())]
            if not (own or alone or tensor.of_base):
                matching = [key for key in matching if adapter in key.split(".")]
            exact = [key for key in matching if key in spellings]
            if len(exact or matching) > 1:
                raise AdapterFileError(f'"{matching[0]}" and "{matching[1]}" both stand for {tensor.own}; give one of them')
            found.update({name: (exact or matching)[0]} if matching else {})
        if found:
            return found
    return {}


def under_own_names(handle: HandleState, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """A dictionary whose keys are those of the handle's own `state_dict()`, as far as they mean one; others stay.

    Raises:
        AdapterFileError: two keys mean the same tensor.
    """
    own = handle.state_dict(keep_vars=True)
    strange = [key for key in state_dict if key not in own]
    if not strange:
        return state_dict
    names: dict[str, str] = {}  # {key: name in the handle}
    alone = len(handle.peft_config) == 1
    for name in handle.peft_config:
        tensors = wanted(handle, name)
        names |= {key: tensors[found].own for found, key in keys_of(tensors, strange, name, alone).items()}
    wrapped = {name: Wanted(name, (), tensor, of_base=True) for name, tensor in own.items()}
    names |= {key: name for name, key in keys_of(wrapped, strange, "", alone).items()}
    renamed = OrderedDict()
    for key, value in state_dict.items():
        name = names.get(key, key)
        if name in renamed:
            raise AdapterFileError(f'"{key}" stands for {name}, which state_dict holds under another name, too; give one')
        renamed[name] = value
    if hasattr(state_dict, "_metadata"):
        renamed._metadata = state_dict._metadata  # type: ignore[attr-defined]
    return renamed


def _plain(key: str, adapter: str) -> str:
    """A key without what wrappers and libraries put into it, and without the adapter's name."""
    left_out = {*_WRAPPERS, _COPY, adapter}
    return current_name(".".join(part for part in key.split(".") if part not in left_out))


def whole(
    tensors: Mapping[str, Wanted], given: Mapping[str, Any] | None, keys: Mapping[str, str], check: bool = True
) -> dict[str, Tensor]:
    """The values of wanted tensors, from `given` unless that is None; every rank must call this for sharded ones.

    Args:
        keys: where `given` holds them (`keys_of`).
        check: False on ranks that take part only so that sharded values can be gathered.

    Raises:
        AdapterFileError: values that are missing, placeholders of weights that are elsewhere, or of another shape.
    """
    found: dict[str, Tensor] = {}
    if given is None:
        tensors = {name: replace(tensor, now=stored_tensors.whole(tensor.now)) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        value = tensor.now if given is None else given.get(keys.get(name, ""))
        if isinstance(value, Tensor):
            value = value.detach()
            found[name] = value.full_tensor() if hasattr(value, "full_tensor") else value
    faults = [fault for name, tensor in tensors.items() if (fault := _fault(tensor, found.get(name), given is None))]
    if faults and check:
        what = "the adapter" if given is None else "state_dict"
        raise AdapterFileError(f"{what} lacks values, so nothing was written; {_ADVICE}:\n" + bullet_list(faults))
    return found


_ADVICE = (
    "give them whole, for example as state_dict=accelerator.get_state_dict(model), or gather them around the call "
    "(DeepSpeed: zero.GatheredParameters, FSDP: summon_full_params)"
)


def _fault(tensor: Wanted, value: Tensor | None, live: bool) -> str | None:
    """Why a value is not the whole tensor; None where it is, as far as one can tell."""
    own, shape = tensor.now, tuple(getattr(tensor.now, "ds_shape", tensor.now.shape))  # ZeRO-3 leaves (0,) as a shape
    if value is None:
        return f"{tensor.own} is missing" if tensor.needed else None
    if value.device.type == "meta":
        return f"{tensor.own} is on the meta device"
    flat = getattr(own, "_fsdp_flattened", False)  # FSDP 1 leaves a process its part of a tensor, in one dimension
    is_whole = tuple(own.shape) == shape and not (flat and own.dim() == 1)
    if (value.numel() == 0 and 0 not in shape) or (live and not is_whole):
        return f"{tensor.own} has the shape {tuple(value.shape)}, because other processes hold the rest"
    if tuple(value.shape) != shape and is_whole:
        return f"{tensor.own} has the shape {tuple(value.shape)}, expected {shape}"
    return None
