"""The calls of a handle: forward, generate, and every other method of the base, each in the handle's frame."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import UsageError
from ..runtime import call_inputs
from ..runtime.frame import BOUNDARIES, Frame
from . import preflight, schedules
from .frames import Frames
from .proxy import Proxy


class Calls(Frames):
    """The part of a handle that is called."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base's forward with the active adapters acting; same arguments, same result type.

        Args:
            adapter_names: for each row the name of the adapter that acts on it (in place of the active ones), or
                "__base__" for none; of any methods, in training and in evaluation.
            cu_seq_lens_q: where texts start and end that are packed into one row, `(texts + 1,)`; none attends to another.
        """
        names = kwargs.pop("adapter_names", None)
        return self.forward_within(self.frame if names is None else self.mixed_frame(names, args, kwargs), *args, **kwargs)

    def forward_within(self, frame: Frame, *args: Any, **kwargs: Any) -> Any:
        """As `forward`, in a frame that need not be the handle's own."""
        if kwargs.get(BOUNDARIES) is not None:
            kwargs.update(zip(self.accepts, args))
            args, (frame, kwargs) = (), self.pack(frame, kwargs)
        if preflight.is_due(self, frame):
            result = preflight.checked(self, frame, lambda noted: self._run(noted, args, kwargs))
        else:
            result = self._run(frame, args, kwargs)
        return schedules.with_penalties(result, frame.penalties) if self.training and frame.penalties else result

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

    def prepare(self, frame: Frame, inputs: dict[str, Any]) -> dict[str, Any]:
        """What the base's forward takes for these inputs of the handle's; to be called inside the frame."""
        inputs, task_ids = self._without_task_ids(inputs)
        return call_inputs.prepare(self.base_model, self.input_spec, frame, inputs, task_ids)

    def pack(self, frame: Frame, inputs: dict[str, Any], even: int = 1) -> tuple[Frame, dict[str, Any]]:
        """The frame and the base's inputs of a call whose texts are packed into one row; `even` as in `call_inputs.pack`."""
        inputs, task_ids = self._without_task_ids(inputs)
        with self.entered(frame):
            return call_inputs.pack(self.base_model, self.input_spec, frame, inputs, task_ids, even)

    def _run(self, frame: Frame, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self.entered(frame):
            if not frame.prompts:
                return self.base_model(*args, **self._without_task_ids(kwargs)[0])
            return self.base_model(**self.prepare(frame, {**kwargs, **dict(zip(self.accepts, args))}))

    def _without_task_ids(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
        """The base's part of the inputs, and `task_ids` where an adapter of this handle asks for them."""
        if "task_ids" not in inputs or not any(getattr(self.tree(name).prompt, "by_task", False) for name in self.adapters):
            return inputs, None
        return {name: value for name, value in inputs.items() if name != "task_ids"}, inputs["task_ids"]
