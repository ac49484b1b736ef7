"""The modules of a base as one of its handles shows them: called, they run with the handle's adapters.

A proxy is an object of a class made to order, such as `class LlamaModel(Proxy, LlamaModel)`; its `__dict__` *is* its module's.
So it has all that the module has, `isinstance` holds, and every method finds the proxy as its `self`: what a method starts
(threads, generators, streamers) calls back into the handle by itself. Its call enters the handle's frame and runs the module
itself, so calls inside it cost what they always did.

What is written through a proxy (`training`, a dropout's `p`, flags, hooks) is the handle's own (`runtime/own_state.py`).
Parameters and submodules cannot be replaced through it.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ..errors import UsageError
from ..runtime.frame import current_frame, entered
from ..runtime.own_state import CONFIGS, HOOKS, OwnState

# Methods about a module's own tensors and files, which run on the module itself.
OF_THE_MODULE = (
    "_named_members", "buffers", "init_weights", "named_buffers", "named_parameters", "parameters", "post_init", "push_to_hub",
    "save_pretrained", "state_dict", "tie_weights",
)  # fmt: skip

_NONE = object()


class Shows(Protocol):
    """What a proxy needs of its handle."""

    training: bool
    _own: OwnState

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
    def entered(self) -> entered: ...
    def _root(self) -> Any: ...
    def _proxy(self, module: nn.Module) -> Any: ...
    def _path_of(self, module: nn.Module) -> str | None: ...
    def _check_part(self, module: nn.Module) -> None: ...
    def _stand_in(self, module: nn.Module) -> nn.Module: ...
    def _effective_value(self, module: nn.Module, name: str) -> Any: ...


def module_of(proxy: Any) -> Any:
    """The module itself."""
    return proxy._proxied_module


def handle_of(proxy: Any) -> Any:
    return proxy._proxied_handle


def runs(handle: Any) -> bool:
    """Whether a call of the handle is running on this thread, so that its values are on the modules."""
    frame = current_frame()
    return frame is not None and frame.state is handle._own


class Own:
    """An attribute of a module that may have another value in a handle."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, proxy: Any, owner: type | None = None) -> Any:
        if proxy is None:
            return self
        handle, module = handle_of(proxy), module_of(proxy)
        if self.name in HOOKS:
            return handle._own.hooks(module, self.name)
        value = handle._own.get(module, self.name, _NONE)
        if value is not _NONE:
            return vars(module).get(self.name, value) if runs(handle) else value
        if self.name == "training":
            return handle.training
        value = getattr(module, self.name)
        return handle._own.copied(value) if self.name in CONFIGS else shown(handle, value)

    def __set__(self, proxy: Any, value: Any) -> None:
        handle_of(proxy)._own.set(module_of(proxy), self.name, value, runs(handle_of(proxy)))

    def __delete__(self, proxy: Any) -> None:
        handle_of(proxy)._own.delete(module_of(proxy), self.name, runs(handle_of(proxy)))


class Forward:
    """`proxy.forward`: as calling the proxy, past the module's hooks. (In the shared `__dict__` a site has this name.)"""

    def __get__(self, proxy: Any, owner: Any = None) -> Any:
        function = _forward_of(owner)
        return function if proxy is None else types.MethodType(function, proxy)

    def __set__(self, proxy: Any, value: Any) -> None:
        raise _fixed(proxy, "forward")


@functools.cache
def _forward_of(proxy_class: Any) -> Callable[..., Any]:
    own = next(other for other in proxy_class.__mro__ if not issubclass(other, Proxy))

    @functools.wraps(own.forward)
    def forward(proxy: Any, *args: Any, **kwargs: Any) -> Any:
        return proxy._run("forward", args, kwargs)

    return forward


class Proxy:
    """Of one module of a base, for one handle."""

    __slots__ = ("_proxied_handle", "_proxied_module")

    forward: Any = Forward()
    training = Own("training")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """(The hook of the module's class is not called; transformers' would change class data.)"""

    @staticmethod
    def _names_beside(module_class: type) -> dict[str, Any]:
        """What a proxy's class defines beside its own, given the class of its module."""
        return {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run("__call__", args, kwargs)

    def _run(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        handle = handle_of(self)
        module = handle._stand_in(module_of(self))
        if runs(handle):
            return getattr(module, name)(*args, **kwargs)
        handle._check_part(module_of(self))
        with handle.entered():
            result = getattr(module, name)(*args, **kwargs)
        if inspect.isgenerator(result) or inspect.iscoroutine(result):
            result.close()
            raise UsageError("a generator or coroutine cannot keep adapters in effect between its steps")
        return result

    @property
    def __class__(self) -> Any:
        return type(module_of(self))

    @__class__.setter
    def __class__(self, value: Any) -> None:
        if not issubclass(value, FSDPModule):
            raise _fixed(self, "__class__")
        module_of(self).__class__ = value

    @property
    def _modules(self) -> Mapping[str, Any]:
        return Shown(handle_of(self), module_of(self)._modules)

    def __getattr__(self, name: str) -> Any:
        handle, module = handle_of(self), module_of(self)
        value = getattr(module, name)
        if isinstance(value, Tensor):
            return value if isinstance(value, DTensor) else handle._effective_value(module, name)  # FSDP looks for its own
        return shown(handle, value)

    def __setattr__(self, name: str, value: Any) -> None:
        module = module_of(self)
        present = next((held[name] for held in (module._parameters, module._modules) if name in held), None)
        if value is not None and unwrapped(value) is present:
            return
        if isinstance(value, DTensor) or isinstance(present, DTensor) or name == "_parameters":
            setattr(module, name, value)  # FSDP and DeepSpeed, which shard parameters and keep their values
            return
        if present is not None or isinstance(value, (nn.Parameter, nn.Module)):
            raise _fixed(self, name)
        _make_own(type(self), name)
        object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        if handle_of(self)._own.get(module_of(self), name, _NONE) is _NONE:
            raise _fixed(self, name)
        object.__delattr__(self, name)

    def __eq__(self, other: Any) -> bool:
        """As the module itself, so that what is kept by module (FSDP's states) is found by either."""
        return other is self or other is module_of(self)

    def __hash__(self) -> int:
        return hash(module_of(self))

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        if requires_grad:
            raise UsageError(
                "a base stays frozen; name modules to train in modules_to_save, which trains private copies of them"
            )
        return self

    def load_state_dict(self, *_: Any, **__: Any) -> Any:
        raise UsageError("a base cannot be changed through a handle; load its weights before attaching")

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        module = module_of(self)
        if any(function(tensor) is not tensor for tensor in (*module.parameters(recurse), *module.buffers(recurse))):
            raise UsageError("a part of a base cannot be moved or cast on its own; move the whole handle")
        return self

    def _replicate_for_data_parallel(self) -> Any:
        return module_of(self)._replicate_for_data_parallel()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _of_path, (handle_of(self), handle_of(self)._path_of(module_of(self)))


def _on_the_module(name: str) -> Any:
    return lambda self, *args, **kwargs: getattr(module_of(self), name)(*args, **kwargs)


for _name in OF_THE_MODULE:
    setattr(Proxy, _name, _on_the_module(_name))
for _name in (*HOOKS, *CONFIGS):
    setattr(Proxy, _name, Own(_name))


class Shown(Mapping[str, Any]):
    """Submodules by name, as a handle shows them."""

    def __init__(self, handle: Any, modules: Mapping[str, Any]) -> None:
        self.handle = handle
        self.modules = modules

    def __getitem__(self, name: str) -> Any:
        return shown(self.handle, self.modules[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)

    def __setitem__(self, name: str, value: Any) -> None:
        if unwrapped(value) is not self.modules.get(name):
            raise UsageError(f"{name} cannot be replaced through a handle; change the base first, then attach")


def shown(handle: Any, value: Any) -> Any:
    """A value found on a module of the base: modules as proxies, methods bound to them, and lists of either likewise."""
    if isinstance(value, nn.Module):
        return handle._proxy(value)
    if isinstance(value, types.MethodType) and _leads_on(value):
        owner: Any = value.__self__
        bound = handle._proxy(owner)
        return bound.forward if value.__func__ is type(owner).forward else types.MethodType(value.__func__, bound)
    if type(value) in (list, tuple) and _leads_on(value):
        return type(value)(shown(handle, item) for item in value)
    if type(value) is dict and _leads_on(value):
        return {key: shown(handle, item) for key, item in value.items()}
    return value


def unwrapped(value: Any) -> Any:
    """The module behind a proxy; anything else as it is."""
    return module_of(value) if is_proxy(value) else value


def is_proxy(value: Any) -> bool:
    """Whether a value is a module as a handle shows it."""
    return issubclass(type(value), Proxy)


def make_proxy(handle: Shows, module: nn.Module, kind: type[Proxy] = Proxy) -> Any:
    """A new proxy of a module."""
    cls = _proxy_class(kind, type(module))  # type: ignore[arg-type]
    proxy = object.__new__(cls)
    object.__setattr__(proxy, "_proxied_handle", handle)
    object.__setattr__(proxy, "_proxied_module", module)
    object.__setattr__(proxy, "__dict__", module.__dict__)
    for name, value in vars(module).items():
        if name not in _TORCHS and _leads_on(value):
            _make_own(cls, name)
    return proxy


_TORCHS = frozenset({*vars(nn.Module()), "forward"})


def _leads_on(value: Any) -> bool:
    """Whether `shown` may show this value differently, a submodule aside."""
    if isinstance(value, types.MethodType):
        return isinstance(value.__self__, nn.Module)
    held = value.values() if type(value) is dict else value if type(value) in (list, tuple) else ()
    return any(isinstance(item, nn.Module) for item in held)


@functools.cache
def _proxy_class(kind: Any, cls: Any) -> Any:
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__, "__slots__": ()}
    return type(cls)(cls.__name__, (kind, cls), {**names, **kind._names_beside(cls)})


def _make_own(cls: type, name: str) -> None:
    """Let proxies of this class have values of their own for an attribute (unless a property of the module's class sets it)."""
    if not hasattr(inspect.getattr_static(cls, name, None), "__set__"):
        setattr(cls, name, Own(name))


def _fixed(proxy: Any, name: str) -> UsageError:
    path = handle_of(proxy)._path_of(module_of(proxy)) or "the base"
    return UsageError(
        f"{name} of {path} cannot be changed through a handle, which leaves its base as it is; change it before attaching"
    )


def _of_path(handle: Any, path: str) -> Any:
    root = handle._root()
    return root.get_submodule(path) if path else root
