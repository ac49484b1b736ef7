"""The methods of a base, called through its handle: `generate` and all others, each in the handle's frame."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from ..errors import UsageError
from ..runtime import call_inputs
from ..runtime.frame import BOUNDARIES, Frame
from . import preflight
from .calls import Calls
from .proxy import Proxy


class BaseMethods(Calls):
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
                args, kwargs = call_inputs.for_generate(self.base_model, self.input_spec, frame, args, kwargs, task_ids)
            return self.base_model.generate(*args, **kwargs)

    def _call_base(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Any other method of the base, with the adapters in effect, as they are in a module that it returns."""
        with self.entered():
            result = getattr(self.base_model, name)(*args, **kwargs)
        if isinstance(result, nn.Module) and name in ("get_encoder", "get_decoder"):
            return Proxy(self, result)
        return result

    def _from_base(self, name: str) -> Any:
        """An attribute of the base; its own methods run with the adapters in effect."""
        value = getattr(self.base_model, name)
        if inspect.ismethod(value) and value.__self__ is self.base_model:
            return Proxy(self, value)
        return value
