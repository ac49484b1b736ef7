"""The forward pass of a handle, in the handle's frame."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..runtime import cache, call_inputs
from ..runtime.frame import BOUNDARIES, Frame, entered
from . import preflight, schedules
from .frames import Frames
from .replicas import mend


class Calls(Frames):
    """The part of a handle that runs its base."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base's forward with the active adapters in effect; same arguments, same result type.

        Args:
            adapter_names: for each row the name of its adapter (in place of the active ones), or "__base__" for none; the
                adapters may be of any methods, in training and in evaluation.
            cu_seq_lens_q: boundaries of the texts packed into one row, `(texts + 1,)`; each attends only to itself.
        """
        if "_is_replica" in self.__dict__:  # torch's mark of a copy that `nn.DataParallel` made
            mend(self)
        names = kwargs.pop("adapter_names", None)
        frame = self.effective_frame if names is None else self._mixed_frame(names, args, kwargs)
        return self.forward_within(frame, *args, **kwargs)

    def forward_within(self, frame: Frame, *args: Any, **kwargs: Any) -> Any:
        """As `forward`, in a frame that need not be the handle's own."""
        if kwargs.get(BOUNDARIES) is not None and not cache.is_paged(cache.given(kwargs)):
            kwargs.update(zip(self._accepts, args))
            args, (frame, kwargs) = (), self.pack_inputs(frame, kwargs)
        if self.is_due(frame):
            result = preflight.checked(self, frame, "forward", lambda noted: self._run(noted, args, kwargs))
        else:
            result = self._run(frame, args, kwargs)
        return schedules.with_penalties(result, frame.penalties) if self.training and frame.penalties else result

    def is_due(self, frame: Frame, method: str = "forward") -> bool:
        """Whether this is the method's first call with these adapters in this mode, to be checked (`preflight`)."""
        if torch.compiler.is_compiling():
            return False
        return bool(frame.names) and (frame.names, self._trains, method) not in self._checked

    def entered(self, frame: Frame | None = None) -> entered:
        """The context manager of a frame of this handle, by default the one of its effective adapters.

        Raises:
            UsageError: the active adapters cannot act together, or their modules are no longer on the base.
        """
        frame = self.effective_frame if frame is None else frame
        if self._conflict is not None and frame.mixture is None and frame.names == self.effective_frame.names:
            raise UsageError(self._conflict)
        traced = torch.compiler.is_compiling()
        if not traced:
            self._check_in_place(frame)
            self._own.sync()
        return entered(frame, traced=traced)

    def _check_in_place(self, frame: Frame) -> None:
        if frame.adapters and any(children.get(name) is not child for children, name, child in self._ways):
            raise UsageError(
                f"modules under adapters ({', '.join(frame.names)}) were replaced on the base, for example by resizing its "
                "embeddings, so the adapters would have no effect; change the base first, then attach"
            )

    def prepare_inputs(self, frame: Frame, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs of the base's forward for these inputs of the handle; must be called inside the frame."""
        inputs, task_ids = self._without_task_ids(inputs)
        return call_inputs.prepare(self.bare_base, self.input_spec, frame, inputs, task_ids)

    def pack_inputs(self, frame: Frame, inputs: dict[str, Any], multiple_of: int = 1) -> tuple[Frame, dict[str, Any]]:
        """The frame and the base's inputs of a call whose texts are packed into one row; see `call_inputs.pack`."""
        inputs, task_ids = self._without_task_ids(inputs)
        with self.entered(frame):
            return call_inputs.pack(self.bare_base, self.input_spec, frame, inputs, task_ids, multiple_of)

    def _run(self, frame: Frame, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self.entered(frame):
            if not frame.prompts:
                return self.bare_base(*args, **self._without_task_ids(kwargs)[0])
            return self.bare_base(**self.prepare_inputs(frame, {**kwargs, **dict(zip(self._accepts, args))}))

    def _without_task_ids(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
        """The inputs for the base, and `task_ids` if an adapter of this handle uses them."""
        if "task_ids" not in inputs or not any(getattr(self.tree(name).prompt, "by_task", False) for name in self.adapters):
            return inputs, None
        return {name: value for name, value in inputs.items() if name != "task_ids"}, inputs["task_ids"]
