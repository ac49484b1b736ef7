"""The methods of a base, called through its handle: `generate` and every other, each in the handle's frame."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from ..errors import UsageError
from ..runtime import call_inputs
from ..runtime.frame import BOUNDARIES
from .calls import Calls
from .proxy import Proxy


class BaseMethods(Calls):
    """The part of a handle that answers as its base would, with the adapters acting."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base's `generate` with the active adapters acting; same arguments, same result.

        Virtual tokens are no part of the result, and `max_length` counts without them. `adapter_names` is one name
        for each row, as in `forward`.
        """
        if kwargs.get(BOUNDARIES) is not None:
            raise UsageError(f"generate goes on with one text in each row; pad texts into rows and leave {BOUNDARIES} out")
        names = kwargs.pop("adapter_names", None)
        frame = self.frame if names is None else self.mixed_frame(names, args, kwargs)
        with self.entered(frame):
            kwargs, task_ids = self._without_task_ids(kwargs)
            if frame.prompts:
                args, kwargs = call_inputs.for_generate(self.base_model, self.input_spec, frame, args, kwargs, task_ids)
            return self.base_model.generate(*args, **kwargs)

    def call_base(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Any other method of the base, with the adapters acting; modules it returns act with them, too."""
        with self.entered():
            result = getattr(self.base_model, name)(*args, **kwargs)
        if isinstance(result, nn.Module) and name in ("get_encoder", "get_decoder"):
            return Proxy(self, result)
        return result

    def from_base(self, name: str) -> Any:
        """An attribute of the base; its own methods run with the adapters acting."""
        value = getattr(self.base_model, name)
        if inspect.ismethod(value) and value.__self__ is self.base_model:
            return Proxy(self, value)
        return value
