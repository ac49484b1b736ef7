"""Callables of a base that run with a handle's adapters."""

from __future__ import annotations

import inspect
from typing import Any, Protocol

from torch import nn

from ..errors import UsageError
from ..runtime.frame import Frame, entered

CONTINUOUS_BATCHING = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


class Enters(Protocol):
    """What a proxy needs of its handle."""

    effective_frame: Frame

    def entered(self, frame: Frame | None = None) -> entered: ...


class Proxy:
    """A callable of the base, obtained from a handle: runs with the handle's adapters and otherwise looks the same."""

    def __init__(self, handle: Enters, target: Any) -> None:
        self._handle = handle
        self._target = target

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        prompts = self._handle.effective_frame.prompts
        if isinstance(self._target, nn.Module) and any(not prompt.in_cache for prompt, _ in prompts):
            raise UsageError("virtual tokens are inserted by the handle's own forward and generate; call those")
        if prompts and getattr(self._target, "__name__", None) in CONTINUOUS_BATCHING:
            raise UsageError("continuous batching has no room for virtual tokens in its paged cache; use generate")
        with self._handle.entered():
            result = self._target(*args, **kwargs)
        if inspect.isgenerator(result) or inspect.iscoroutine(result):
            result.close()
        elif not inspect.isasyncgen(result):
            return result
        raise UsageError("a generator or coroutine cannot keep adapters in effect between steps; call the base's own method")

    def __getattr__(self, name: str) -> Any:
        return inspect.signature(self._target) if name == "__signature__" else getattr(self._target, name)
