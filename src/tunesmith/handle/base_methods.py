"""The methods of a base, called through its handle: `generate` and all others, each in the handle's frame."""

from __future__ import annotations

from typing import Any

from ..errors import UsageError
from ..runtime import generation
from ..runtime.frame import BOUNDARIES, Frame, entered
from . import preflight
from .reaching import Reaching


class BaseMethods(Reaching):
    """The part of a handle that calls its base's methods with the adapters in effect."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base's `generate` with the active adapters in effect; same arguments, same result.

        Virtual tokens are not part of the result, and `max_length` does not count them. `adapter_names` holds one name
        for each row, as in `forward`.
        """
        if kwargs.get(BOUNDARIES) is not None:
            raise UsageError(f"generate continues one text per row; pad the texts into rows and leave {BOUNDARIES} out")
        names = kwargs.pop("adapter_names", None)
        frame = self.effective_frame if names is None else self._mixed_frame(names, args, kwargs)
        if self.is_due(frame, "generate"):
            return preflight.checked(self, frame, "generate", lambda noted: self._generate(noted, args, kwargs))
        return self._generate(frame, args, kwargs)

    def _generate(self, frame: Frame, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self.entered(frame):
            kwargs, task_ids = self._without_task_ids(kwargs)
            if frame.prompts:
                frame, args, kwargs = generation.for_generate(self.bare_base, self.input_spec, frame, args, kwargs, task_ids)
            with entered(frame):
                return type(self.bare_base).generate(self._root(), *args, **kwargs)

    def _call_base(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Any other method of the base; its `self` is the base as this handle shows it."""
        return getattr(self._root(), name)(*args, **kwargs)

    def _from_base(self, name: str) -> Any:
        """An attribute of the base."""
        if name == "model" and not hasattr(self.bare_base, name):  # where peft's handles have the base
            return self._root()
        return getattr(self._root(), name)
