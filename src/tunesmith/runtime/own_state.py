"""What a handle sets on the modules of its base: its mode, and attributes that clients write.

A base is shared and stays as it is, but its code reads `self.training`, `self.gradient_checkpointing` or a dropout's `p` from
its modules. So each handle keeps values of its own, which are on the modules only between `enter` and `leave`: during a call
and while a layer is recomputed. Calls of several threads share what is equal; a call that needs other values waits.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.hooks import RemovableHandle

from ..errors import UsageError

PATIENCE = 60.0  # seconds that a call waits for another thread's to end

# A module's hooks: the base's own and the handle's run both. (The last ones say how some of them are called.)
HOOKS = (
    "_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks",
    "_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
)  # fmt: skip

# Objects that clients write to: a handle has copies of its own, which act once they differ.
CONFIGS = ("config", "generation_config")

_NO_STATISTICS = dict.fromkeys(("running_mean", "running_var", "num_batches_tracked"))
_ABSENT = object()
# Of a module's `__dict__`, in the order of the changes: a name, the value before, and where the handle keeps its own.
_Undo = list[tuple[dict[str, Any], str, Any, "dict[str, Any] | None"]]


def keeps_statistics(module: nn.Module) -> bool:
    """Whether the module adds to its buffers what it sees in training, as a batch norm does."""
    return isinstance(module, _NormBase) and module.track_running_stats


class OwnState:
    """One handle's values for the modules of its base.

    In training, batch norms use the statistics of the batch, as always, but do not add them to those that they keep, which are
    the base's. A private copy (`modules_to_save`) has statistics of its own, which are trained and saved.
    """

    def __init__(self, base: nn.Module) -> None:
        self._base = base
        self._values: dict[nn.Module, dict[str, Any]] = {}
        self._kept: dict[nn.Module, dict[str, Any]] = {}  # what no forward reads, and torch.compile cannot trace
        self._turns = _turns_of(base)
        self._copies: dict[int, Any] = {}  # of configurations, by what they copy
        self._as_copied: list[tuple[Any, dict[str, Any]]] = []
        self.find_modules()

    def __reduce__(self) -> tuple[Any, ...]:
        return OwnState, (self._base,), {"_values": self._values, "_kept": self._kept}

    def find_modules(self) -> None:
        """Must be called again when modules of the base were replaced."""
        self.modules = [module for module in self._base.modules() if "training" in vars(module)]
        self._dicts = [vars(module) for module in self.modules]
        self.statistics: list[Any] = [module for module in self.modules if keeps_statistics(module)]

    def get(self, module: nn.Module, name: str, default: Any = None) -> Any:
        """The handle's value for an attribute, if it has one."""
        for store in (self._values, self._kept):
            if name in store.get(module, {}):
                return store[module][name]
        return default

    def set(self, module: nn.Module, name: str, value: Any, running: bool = False) -> None:
        """Give an attribute a value; in the middle of a call of the handle (`running`), it acts from there on."""
        held = value if isinstance(value, list) else [value]
        store = self._kept if held and all(isinstance(item, RemovableHandle) for item in held) else self._values
        with self._turns.paused(self) if running else nullcontext():
            self._drop(module, name)
            store.setdefault(module, {})[name] = value

    def delete(self, module: nn.Module, name: str, running: bool = False) -> None:
        with self._turns.paused(self) if running else nullcontext():
            self._drop(module, name)

    def _drop(self, module: nn.Module, name: str) -> None:
        for store in (self._values, self._kept):
            store.get(module, {}).pop(name, None)

    def hooks(self, module: nn.Module, name: str) -> OrderedDict[Any, Any]:
        """The handle's hooks on a module, of one of the kinds in `HOOKS`; may be changed."""
        found: OrderedDict[Any, Any] = self._values.setdefault(module, {}).setdefault(name, OrderedDict())
        return found

    def copied(self, config: Any) -> Any:
        """The handle's own copy of a configuration of the base; a part of a configuration is a part of its copy."""
        if config is None or isinstance(config, type):
            return config
        if id(config) not in self._copies:
            for name in CONFIGS:
                copy.deepcopy(getattr(self._base, name, None), self._copies)
            copy.deepcopy(config, self._copies)
            self._as_copied = [(each, dict(vars(each))) for each in self._copies.values() if hasattr(each, "to_dict")]
        return self._copies[id(config)]

    def sync(self, running: bool = False) -> None:
        """Let copies of configurations act that were changed since they were made."""
        if not any(vars(each) != before for each, before in self._as_copied):
            return
        self._as_copied = []
        with self._turns.paused(self) if running else nullcontext():
            for module in self._base.modules():
                for name in CONFIGS:
                    if id(vars(module).get(name)) in self._copies:
                        self.set(module, name, self._copies[id(vars(module)[name])])

    def forget(self, name: str) -> None:
        """Drop the handle's values for this attribute on all modules."""
        for values in self._values.values():
            values.pop(name, None)

    def enter(self, training: bool, traced: bool = False) -> Any:
        """Put the values on the modules; what is returned must be given to `leave`.

        Raises:
            UsageError: another thread keeps this base in a different state for too long.
        """
        return self._traced(training) if traced else self._turns.take(self, training)

    def leave(self, entered: Any, traced: bool = False) -> None:
        """Undo `enter`, once no other call needs the same state."""
        if not traced:
            self._turns.give(entered)
            return
        for module, name, value in reversed(entered):
            if value is _ABSENT:
                delattr(module, name)
            else:
                setattr(module, name, value)

    def apply(self, training: bool) -> _Undo:
        undo: _Undo = []
        for values in self._dicts:
            if values["training"] is not training:
                undo.append((values, "training", not training, None))
                values["training"] = training
        for module in self.statistics if training else ():
            undo.append((vars(module), "_buffers", module._buffers, None))
            vars(module)["_buffers"] = {**module._buffers, **_NO_STATISTICS}
        for module, name, value in self._own():
            attributes = vars(module)
            present = attributes.get(name, _ABSENT)
            undo.append((attributes, name, present, None if name in HOOKS else self._values[module]))
            attributes[name] = OrderedDict([*present.items(), *value.items()]) if name in HOOKS else value
        return undo

    def _traced(self, training: bool) -> list[tuple[nn.Module, str, Any]]:
        """As `apply`, in terms that `torch.compile` can trace."""
        undo: list[tuple[nn.Module, str, Any]] = []
        for module in self.modules:
            if module.training is not training:
                undo.append((module, "training", not training))
                module.training = training
        for module in self.statistics if training else ():
            undo.append((module, "track_running_stats", True))
            module.track_running_stats = False
        for module, name, value in self._own():
            present: Any = getattr(module, name, _ABSENT)
            undo.append((module, name, present))
            setattr(module, name, OrderedDict([*present.items(), *value.items()]) if name in HOOKS else value)
        return undo

    def has_values(self) -> bool:
        """Whether anything but the mode is set."""
        return any(True for _ in self._own())

    def _own(self) -> Iterator[tuple[nn.Module, str, Any]]:
        for module, values in self._values.items():
            for name, value in values.items():
                if value or name not in HOOKS:
                    yield module, name, value


def _undo(changes: _Undo) -> None:
    for attributes, name, value, store in reversed(changes):
        if store is not None and name in attributes:
            store[name] = attributes[name]  # the base's code may have set it again
        if value is _ABSENT:
            attributes.pop(name, None)
        else:
            attributes[name] = value


class _Turn:
    """A state that calls have asked for, with the number of calls that need it, by thread."""

    def __init__(self, key: Any, state: OwnState, training: bool) -> None:
        self.key, self.state, self.training = key, state, training
        self.calls: dict[int, int] = {}
        self.undo: _Undo = []


class _Turns:
    """Which state a base is in. Calls inside calls may change it; calls of several threads share it, or take turns."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._stack: list[_Turn] = []  # the last one's state is on the base

    def take(self, state: OwnState, training: bool) -> _Turn:
        key, me = (training, state if state.has_values() else None), threading.get_ident()
        with self._changed:
            while self._stack and self._stack[-1].key != key and self._others(me):
                inside = any(me in turn.calls for turn in self._stack)
                if inside or not self._changed.wait(PATIENCE):
                    raise UsageError(
                        "another thread is running this base in a different state (training or evaluating, or with other "
                        "attributes), which modules cannot be in at the same time; run these calls one after another, or "
                        "give each thread a copy of the base"
                    )
            if not self._stack or self._stack[-1].key != key:
                self._change(add=_Turn(key, state, training))
            turn = self._stack[-1]
            turn.calls[me] = turn.calls.get(me, 0) + 1
            return turn

    def give(self, turn: _Turn) -> None:
        me = threading.get_ident()
        with self._changed:
            turn.calls[me] -= 1
            if not turn.calls[me]:
                del turn.calls[me]
            while self._stack and not self._stack[-1].calls:
                self._change()
            self._changed.notify_all()

    @contextmanager
    def paused(self, state: OwnState) -> Iterator[None]:
        """Inside, the state of the calls that run is not on the base; afterwards it is this one, as it is by then."""
        with self._changed:
            top = self._stack[-1]
            _undo(top.undo)
            try:
                yield
            finally:
                top.state, top.key = state, (top.training, state if state.has_values() else None)
                top.undo = state.apply(top.training)

    def _change(self, add: _Turn | None = None) -> None:
        """Put another state on the base, in place of the last one, or the one before it again."""
        if self._stack:
            _undo(self._stack[-1].undo)
        if add is None:
            self._stack.pop()
        else:
            self._stack.append(add)
        if self._stack:
            self._stack[-1].undo = self._stack[-1].state.apply(self._stack[-1].training)

    def _others(self, me: int) -> bool:
        return any(thread != me for turn in self._stack for thread in turn.calls)


_by_base: weakref.WeakKeyDictionary[nn.Module, _Turns] = weakref.WeakKeyDictionary()


def _turns_of(base: nn.Module) -> _Turns:
    if base not in _by_base:
        _by_base[base] = _Turns()
    return _by_base[base]
