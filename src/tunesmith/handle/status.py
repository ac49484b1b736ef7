"""What a handle's adapters are and where they sit, as data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from ..adapter import ModuleCopy, ParameterAdapter
from ..bases.quantised import logical_size
from ..errors import UsageError
from .describe import described
from .shared_base import handles_of
from .state import HandleState

Irregular = Literal["irregular"]  # the ecosystem's word for "not the same everywhere"


@dataclass
class TunerLayerStatus:
    """One module of the base that carries adapters, or "inputs" for virtual tokens.

    Args:
        name: the module's path in the base.
        module_type: method and type of the module, such as `lora.Linear`; "modules_to_save" stands for a private copy.
        enabled: whether the handle's adapters are switched on.
        active_adapters: the handle's active adapters, whether or not they sit here.
        merged_adapters: which of the adapters here are in the base's weights.
        requires_grad: whether an adapter's tensors here train.
        available_adapters: the adapters that sit here.
        devices: types of the devices of each adapter's tensors here.
        quantization_backend: how the module's weight is stored; None if it is a plain tensor.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class TunerModelStatus:
    """A whole handle; fields as those of `TunerLayerStatus`, over all of its modules.

    Args:
        base_model_type, adapter_model_type: classes of the base and of the handle.
        peft_types: the method of each adapter.
        trainable_params, total_params: numbers of parameters.
        num_adapter_layers: how many modules carry adapters.
    """

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | Irregular | None


def get_layer_status(model: HandleState) -> list[TunerLayerStatus]:
    """The status of every module that carries adapters, in the order of the base's modules.

    Raises:
        UsageError: `model` is not a handle, or has no adapters.
    """
    handle = _handle(model)
    here: dict[str, dict[str, list[nn.Module]]] = {}
    for name in handle.peft_config:
        for path, module in _parts(handle.tree(name)):
            here.setdefault(path, {}).setdefault(name, []).append(module)
    order = {path: i for i, (path, _) in enumerate(handle.bare_base.named_modules())}
    return [_status(handle, path, here[path]) for path in sorted(here, key=lambda path: order.get(path, -1))]


def get_model_status(model: HandleState) -> TunerModelStatus:
    """The status of a handle as a whole.

    Raises:
        UsageError: `model` is not a handle, or has no adapters.
    """
    handle = _handle(model)
    layers = get_layer_status(handle)
    trainable, total = parameter_counts(handle)
    names = sorted(handle.peft_config)
    return TunerModelStatus(
        base_model_type=type(handle.bare_base).__name__,
        adapter_model_type=type(handle).__name__,
        peft_types={name: str(config.method) for name, config in handle.peft_config.items()},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=not handle._disabled,
        active_adapters=list(handle._active),
        merged_adapters=sorted(handle.merged_adapters),
        requires_grad={name: _alike(p.requires_grad for p in handle.tree(name).parameters()) for name in names},
        available_adapters=names,
        devices={name: _devices(handle.tree(name).parameters()) for name in names},
        quantization_backend=None,
    )


def parameter_counts(handle: HandleState) -> tuple[int, int]:
    """`(trainable, all)` numbers of parameters; shared ones count once."""
    sizes = [(logical_size(p), p.requires_grad) for p in handle.parameters()]
    return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)


class Reporting(HandleState):
    """The part of a handle that says what it is."""

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """The status of every module that carries adapters."""
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """The status of this handle as a whole."""
        return get_model_status(self)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """`(trainable, all)` parameter counts; shared parameters count once."""
        return parameter_counts(self)

    def print_trainable_parameters(self) -> None:
        """`trainable params: 4,096 || all params: 559,218,688 || trainable%: 0.0007`"""
        trainable, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}")

    def _get_name(self) -> str:
        """The base's class name: transformers' Trainer decides by it whether to shift labels when it smooths them."""
        return str(self.bare_base._get_name())

    def __repr__(self) -> str:
        return described(self)


INPUTS = "inputs"


def _parts(tree: Any) -> Iterator[tuple[str, nn.Module]]:
    if tree.prompt is not None:
        yield INPUTS, tree.prompt
    yield from tree.items()


def _status(handle: HandleState, path: str, adapters: dict[str, list[nn.Module]]) -> TunerLayerStatus:
    parts = {name: [p for module in modules for p in module.parameters()] for name, modules in adapters.items()}
    kinds = dict.fromkeys(_kind(handle, name, module) for name, modules in adapters.items() for module in modules)
    module = next(iter(adapters.values()))[0] if path == INPUTS else handle.bare_base.get_submodule(path)
    return TunerLayerStatus(
        name=path,
        module_type=f"{'+'.join(kinds)}.{type(module).__name__}",
        enabled=not handle._disabled,
        active_adapters=list(handle._active),
        merged_adapters=[name for name in adapters if name in handle.merged_adapters],
        requires_grad={name: _alike(p.requires_grad for p in parameters) for name, parameters in parts.items()},
        available_adapters=sorted(adapters),
        devices={name: _devices(parameters) for name, parameters in parts.items()},
        quantization_backend=None,
    )


def _kind(handle: HandleState, name: str, module: nn.Module) -> str:
    if isinstance(module, ModuleCopy):
        return "modules_to_save"
    return "bias" if isinstance(module, ParameterAdapter) else str(handle.peft_config[name].method).lower()


def _alike(flags: Iterable[bool]) -> bool | Irregular:
    found = set(flags)
    return found.pop() if len(found) == 1 else "irregular" if found else False


def _devices(parameters: Iterable[nn.Parameter]) -> list[str]:
    return sorted({p.device.type for p in parameters})


def _handle(model: Any) -> HandleState:
    if not hasattr(model, "peft_config") or not hasattr(model, "adapters"):
        count = len(handles_of(model)) if isinstance(model, nn.Module) else 0
        more = f"; {count} handle(s) share this base; pass one of them" if count else ""
        raise UsageError(f"expected a handle, as returned by get_peft_model; a {type(model).__name__} holds no adapters{more}")
    if not model.peft_config:
        raise UsageError("this handle has no adapters; add one with add_adapter or load_adapter")
    found: HandleState = model
    return found
