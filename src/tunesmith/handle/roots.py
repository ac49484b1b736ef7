"""A whole base as one of its handles shows it."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import UsageError
from ..runtime.site import site_of
from .proxy import OF_THE_MODULE, Forward, Proxy, handle_of, module_of, runs

# What clients of peft ask of `handle.base_model`, besides the base.
OF_THE_HANDLE = (
    "active_adapter", "active_adapters", "add_weighted_adapter", "delete_adapter", "disable_adapter_layers",
    "enable_adapter_layers", "get_model_status", "get_layer_status", "merge_adapter", "merge_and_unload", "peft_config",
    "prepare_model_for_gradient_checkpointing", "set_adapter", "unload", "unmerge_adapter",
)  # fmt: skip


# Methods of transformers that run a paged cache in a thread of their own, where an error would only be logged.
CONTINUOUS_BATCHING = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


class OwnForward(Forward):
    """`root.forward`: what a client puts there takes the place of the base's forward while the handle runs."""

    def __get__(self, proxy: Any, owner: Any = None) -> Any:
        own = None if proxy is None else handle_of(proxy)._own.get(module_of(proxy), "forward")
        return super().__get__(proxy, owner) if own is None else own

    def __set__(self, proxy: Any, value: Any) -> None:
        handle_of(proxy)._own.set(module_of(proxy), "forward", value)

    def __delete__(self, proxy: Any) -> None:
        handle_of(proxy)._own.delete(module_of(proxy), "forward")


class Root(Proxy):
    """Of a whole base: its call and `generate` are the handle's, virtual tokens included."""

    __slots__ = ()

    forward = OwnForward()

    def _run(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        handle, module = handle_of(self), module_of(self)
        if not runs(handle):
            return getattr(handle, name)(*args, **kwargs)
        handle._own.sync(running=True)
        if name == "forward" and handle._own.get(module, "forward") is not None:  # which calls the one that it replaced
            return (site_of(module) or types.MethodType(type(module).forward, module))(*args, **kwargs)
        return getattr(module, name)(*args, **kwargs)

    @property
    def generate(self) -> Any:
        handle, module = handle_of(self), module_of(self)
        return types.MethodType(type(module).generate, self) if runs(handle) else handle.generate

    def train(self, mode: bool = True) -> Any:
        handle_of(self).train(mode)
        return self

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        return handle_of(self).resize_token_embeddings(*args, **kwargs)

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if any(function(tensor.new_empty(0)).dtype != tensor.dtype for tensor in module_of(self).parameters(recurse)):
            raise UsageError("a base cannot be cast through a handle; cast it before attaching")
        handle_of(self)._apply(function, recurse)
        return self


class Tuner(Root):
    """`handle.base_model` in peft's form: the base, which is also at `.model`, with the handle's own methods."""

    __slots__ = ()

    __eq__, __hash__ = object.__eq__, object.__hash__  # beside the root below it, not instead of it
    _buffers: Any = property(lambda self: {})
    prefix = "lora_"

    @property
    def _modules(self) -> Mapping[str, Any]:
        return {"model": self.model}

    @property
    def _parameters(self) -> Any:
        """None of its own: the root below it has them. (DeepSpeed puts a dictionary here, and looks for it again.)"""
        return vars(handle_of(self)).get("_parameters_of_tuner", {})

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_parameters":
            vars(handle_of(self))["_parameters_of_tuner"] = value
        else:
            super().__setattr__(name, value)

    @property
    def model(self) -> Any:
        return handle_of(self)._root()

    @staticmethod
    def _names_beside(module_class: type) -> dict[str, Any]:
        """Containers (`nn.Sequential`) are indexed, iterated and counted as the base is."""
        names = [name for name in ("__getitem__", "__iter__", "__len__", "__contains__") if hasattr(module_class, name)]
        return {name: _of_the_root(name) for name in names}

    def __reduce_ex__(self, protocol: Any) -> Any:
        return getattr, (handle_of(self), "base_model")


def _without_virtual_tokens(name: str) -> Any:
    def method(root: Any) -> Any:
        if handle_of(root).effective_frame.prompts:
            raise UsageError("continuous batching has no room for virtual tokens in its paged cache; use generate")
        return types.MethodType(getattr(type(module_of(root)), name), root)

    return property(method)


for _name in CONTINUOUS_BATCHING:
    setattr(Root, _name, _without_virtual_tokens(_name))


def _of_the_root(name: str) -> Any:
    return lambda tuner, *args: getattr(tuner.model, name)(*args)


def _on_the_handle(name: str) -> Any:
    return property(lambda tuner: getattr(handle_of(tuner), name))


for _name in OF_THE_HANDLE:
    setattr(Tuner, _name, _on_the_handle(_name))
for _name in OF_THE_MODULE:
    if hasattr(nn.Module, _name):  # with the names that they have below a handle
        setattr(Tuner, _name, getattr(nn.Module, _name))
