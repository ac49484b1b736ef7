"""What is reached through a handle: the base and its modules, shown as proxies that act with the handle's adapters."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from ..adapter import ModuleCopy
from ..bases import architecture
from ..errors import UsageError
from ..runtime.frame import entered
from ..runtime.prefix import PrefixedStack
from .calls import Calls
from .proxy import Shown, make_proxy
from .roots import Root, Tuner


class Reaching(Calls):
    """The part of a handle that shows its base.

    Attributes:
        _proxies: the proxies that somebody holds now, by module.
        _paths: the path of each module of the base.
    """

    _proxies: weakref.WeakValueDictionary[tuple[Any, ...], Any]
    _paths: dict[nn.Module, str]
    _copies: dict[str, ModuleCopy]  # the effective private copies of modules that have submodules

    def _forget(self) -> None:
        super()._forget()
        self._proxies = weakref.WeakValueDictionary()
        self._paths = {}
        self._own.find_modules()

    def _settle(self) -> None:
        super()._settle()
        items = (item for name in self._effective for item in self.tree(name).items())
        self._copies = {path: own for path, own in items if isinstance(own, ModuleCopy) and _has_children(own.module)}

    @property
    def base_model(self) -> Any:
        """The base with this handle's adapters in effect, in peft's form: `handle.base_model.model` is the base, too.

        The base without adapters is `handle.bare_base`.
        """
        return self._shown(self.bare_base, Tuner)

    def get_base_model(self) -> Any:
        """The base with this handle's adapters in effect: what is called, or reached through it, acts with them."""
        return self._root()

    def recomputes(self) -> bool:
        """Whether gradient checkpointing is enabled, for this handle or on the base."""
        own, name = self._own, architecture.RECOMPUTES
        return any(own.get(module, name) or architecture.recomputes(module) for module in own.modules)

    def _root(self) -> Any:
        return self._shown(self.bare_base, Root)

    def _proxy(self, module: nn.Module) -> Any:
        """A module of the base as this handle shows it; other modules as they are."""
        if module is self.bare_base:
            return self._root()
        return module if self._path_of(module) is None else self._shown(module)

    def _shown(self, module: nn.Module, *kind: Any) -> Any:
        key = (*kind, module)
        found = self._proxies.get(key)
        if found is None:
            found = self._proxies[key] = make_proxy(self, module, *kind)
        return found

    def _path_of(self, module: nn.Module) -> str | None:
        if module not in self._paths:  # modules may have been added to the base
            self._paths = {each: path for path, each in self.bare_base.named_modules()}
        return self._paths.get(module)

    def _check_part(self, module: nn.Module) -> None:
        """
        Raises:
            UsageError: virtual tokens are in effect, and have no place in a call of this module alone.
        """
        frame, path = self.effective_frame, self._path_of(module) or ""
        if not frame.prompts or not _has_children(module):
            return
        if any(not prompt.in_cache for prompt, _ in frame.prompts):
            raise UsageError(
                f"virtual tokens are inserted by the handle's own forward and generate; {path} alone would run without them"
            )
        stacks = [at.module() for at, adapters in frame.adapters.items() if any(isinstance(a, PrefixedStack) for a in adapters)]
        inside = [stack for stack in stacks if stack is not None and path.startswith(f"{self._path_of(stack)}.")]
        if inside:
            raise UsageError(f"a prefix enters at {self._path_of(inside[0])}; {path} alone would run without it")

    def _stand_in(self, module: nn.Module) -> nn.Module:
        """The module that acts in place of this one: itself, or its counterpart in a private copy of a module around it."""
        if not self._copies:
            return module
        path = self._path_of(module) or ""
        for at, copy in self._copies.items():
            if path.startswith(at + "."):
                return copy.module.get_submodule(path.removeprefix(at + "."))
        return module

    def _effective_value(self, module: nn.Module, name: str) -> Any:
        """A parameter or buffer of a module with the adapters in effect on it."""
        acting = self._stand_in(module)
        if acting is not module:
            return getattr(acting, name)
        with entered(self.effective_frame, state=False):
            return getattr(module, name)

    # --- being a module -------------------------------------------------------------------------------------------

    @property  # type: ignore[override]
    def _modules(self) -> Mapping[str, Any]:
        return _Parts(self)

    @_modules.setter
    def _modules(self, modules: dict[str, Any]) -> None:
        self.__dict__["_modules"] = modules

    def train(self, mode: bool = True) -> Any:
        """Set the mode of this handle's calls. The base's own modules keep theirs."""
        if not isinstance(mode, bool):
            raise ValueError("training mode is expected to be boolean")
        self.training = mode
        self.adapters.train(mode)
        self._own.forget("training")
        self._settle()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Let the active adapters train, or freeze them; the base stays frozen."""
        for name in self._active:
            self.tree(name).requires_grad_(requires_grad)
        return self

    def _apply(self, function: Any, recurse: bool = True) -> Any:
        """Move or cast the base, which all its handles share, and this handle's adapters."""
        self.bare_base._apply(function, recurse)
        self.adapters._apply(function, recurse)  # type: ignore[no-untyped-call]
        return self

    def _named_members(
        self, members: Any, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[Any]:
        seen: set[Any] = set()
        start = prefix + "." if prefix else ""
        for path, module in ((f"{start}base_model.model", self.bare_base), (f"{start}adapters", self.adapters)):
            for name, value in module._named_members(members, path, True, remove_duplicate) if recurse else ():
                if value not in seen or not remove_duplicate:
                    seen.add(value)
                    yield name, value


def _has_children(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


class _Parts(Shown):
    """A handle's submodules: the base in peft's form, and its adapters."""

    def __init__(self, handle: Reaching) -> None:
        super().__init__(handle, {"base_model": handle.bare_base, **handle.__dict__["_modules"]})

    def copy(self) -> dict[str, Any]:
        """The handle's own submodules, as `nn.DataParallel` takes them; it adds copies of the others."""
        return dict(self.handle.__dict__["_modules"])

    def __getitem__(self, name: str) -> Any:
        return self.handle.base_model if name == "base_model" else self.modules[name]
