"""Which adapters act during the current call, per thread.

A `Frame` maps each site to the adapters that act there. It is immutable once made, so one frame serves any number of
threads and calls. Outside any frame every site computes exactly what its module did before.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .contracts import Adapter, Around, PromptAdapter, Twin
    from .segments import Segments
    from .site import Site

BASE_ROW = "__base__"  # in `adapter_names`, a row without an adapter


class Frame:
    """`{site: adapters}` for one call.

    Args:
        adapters: what acts at each site, the first one nearest to the base module.
        prompts: what acts at the model's entrance, each with the number of its virtual tokens.
        fired: where given, collects the sites that were reached (the check of the first training step).
        mixture: for a batch whose rows have different adapters, the frames of its parts; `adapters` is then empty.
        penalties: what is added to the loss in training.
        names: the adapters that act.
        segments: where the texts of a packed row lie.
    """

    def __init__(
        self,
        adapters: dict[Site, tuple[Adapter | Around | Twin, ...]],
        prompts: tuple[tuple[PromptAdapter, int], ...] = (),
        fired: set[Site] | None = None,
        mixture: Mixture | None = None,
        penalties: tuple[Callable[[], Tensor], ...] = (),
        names: tuple[str, ...] = (),
        segments: Segments | None = None,
    ) -> None:
        self.adapters = adapters
        self.prompts = prompts
        self.fired = fired
        self.mixture = mixture
        self.penalties = penalties
        self.names = names
        self.segments = segments

    def noting(self, fired: set[Site]) -> Frame:
        """This frame, with the sites that it reaches collected in `fired`."""
        mixture = self.mixture
        if mixture is not None:
            mixture = Mixture([frame.noting(fired) for frame in mixture.frames], mixture.groups)
        return self._but(fired=fired, mixture=mixture)

    def with_prompts(self, prompts: tuple[tuple[PromptAdapter, int], ...]) -> Frame:
        """This frame, with other virtual tokens at the entrance."""
        return self._but(prompts=prompts)

    def packed(self, segments: Segments, twins: dict[Site, Twin]) -> Frame:
        """This frame for a packed row, whose attentions are called as these twins; virtual tokens are in the row by now."""
        adapters = self.adapters | {site: (*self.adapters.get(site, ()), twin) for site, twin in twins.items()}
        return self._but(adapters=adapters, prompts=(), segments=segments)

    def _but(self, **changed: Any) -> Frame:
        """A copy in which some fields are others."""
        other = copy.copy(self)
        vars(other).update(changed)
        return other


class Mixture:
    """The frames of a mixed batch, and which rows each one is for.

    Args:
        frames: one per group of rows.
        groups: for each frame the indices of its rows, together all of `0 .. size - 1`.
    """

    def __init__(self, frames: list[Frame], groups: list[Tensor]) -> None:
        self.frames = frames
        self.groups = groups
        self.size = sum(len(rows) for rows in groups)
        self._by_length: dict[int, tuple[list[Tensor], Tensor]] = {}

    def real(self, counts: list[int], length: int) -> Tensor:
        """Which of `max(counts)` virtual tokens each of `length` rows has, `(length, n)`; a row's own are the last ones.

        Args:
            counts: how many each part has.
            length: how many rows there are, a multiple of the batch's size (beams).
        """
        groups, inverse = self.rows(length)
        n = max(counts)
        columns = torch.arange(n, device=inverse.device)
        return torch.cat([(columns >= n - count).expand(len(rows), -1) for count, rows in zip(counts, groups)])[inverse]

    def stacked(self, values: list[Tensor | None], dims: int, length: int) -> Tensor:
        """Virtual tokens of each part as one tensor over the rows, `(length, ..., n, dim)`, shorter ones behind padding.

        Args:
            values: for each part `(..., n_i, dim)`, the same for its rows, or `(rows_i, ..., n_i, dim)`; None where the
                part has none.
            dims: dimensions of the former.
            length: how many rows there are, a multiple of the batch's size (beams).
        """
        groups, inverse = self.rows(length)
        n = max(value.shape[-2] for value in values if value is not None)
        like = next(value for value in values if value is not None)
        whole = []
        for value, rows in zip(values, groups):
            if value is None:
                value = like.new_zeros((*like.shape[like.dim() - dims : -2], 0, like.shape[-1]))
            value = torch.nn.functional.pad(value, (0, 0, n - value.shape[-2], 0))
            if value.dim() > dims:
                value = value.repeat_interleave(len(rows) // len(value), 0)
            whole.append(value.expand(len(rows), *value.shape[-dims:]))
        return torch.cat(whole)[inverse]

    def rows(self, length: int) -> tuple[list[Tensor], Tensor]:
        """The groups' indices in a tensor of `length` rows, and the order that undoes putting them one after another.

        Beams and flattened tokens follow each other row by row, so `length` may be a multiple of the batch's size;
        a length of 1 stands for a value that all rows share.
        """
        if length not in self._by_length:
            each = max(length // self.size, 1)
            groups = [(rows[:, None] * each + torch.arange(each, device=rows.device)).flatten() for rows in self.groups]
            self._by_length[length] = groups, torch.cat(groups).argsort()
        return self._by_length[length]


class _Local(threading.local):
    frame: Frame | None = None


_local = _Local()


def current_frame() -> Frame | None:
    """The frame of this thread's innermost handle call, or None."""
    return _local.frame


class entered:
    """Context manager: `frame` is this thread's current frame inside, the previous one again after.

    Never hold one across a `yield`: the caller of a suspended generator would run under it.
    """

    def __init__(self, frame: Frame | None) -> None:
        self.frame = frame
        self.previous: Frame | None = None

    def __enter__(self) -> Frame | None:
        self.previous = _local.frame
        _local.frame = self.frame
        return self.frame

    def __exit__(self, *_: object) -> None:
        _local.frame = self.previous


class CarriesFrame:
    """A checkpointing function whose recomputation sees the frame of its forward pass.

    Backward passes run after the handle's call has ended (and, on CUDA, on another thread), so a recomputed layer would
    run without adapters: reentrant checkpointing then returns `None` gradients and training goes on silently.
    Reentrant checkpointing also needs one input that requires a gradient; a frozen embedding gives none, so an alias
    of the first floating-point input asks for one.
    """

    def __init__(self, checkpoint: Any) -> None:
        self.checkpoint = checkpoint

    def __call__(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        frame = current_frame()
        if frame is None:
            return self.checkpoint(function, *args, **kwargs)
        if self._is_reentrant():
            args = _with_one_gradient(args)

        def run(*inner: Any, **named: Any) -> Any:
            with entered(frame):
                return function(*inner, **named)

        return self.checkpoint(run, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy or pickle of the base alone holds the function as it was."""
        return copy.copy, (self.checkpoint,)

    def _is_reentrant(self) -> bool:
        return bool(getattr(self.checkpoint, "keywords", {}).get("use_reentrant", False))


def _with_one_gradient(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """`args`, where none asks for a gradient with the first floating-point one replaced by an alias that does."""
    floating = [i for i, value in enumerate(args) if isinstance(value, Tensor) and value.is_floating_point()]
    if not floating or any(args[i].requires_grad for i in floating):
        return args
    first = floating[0]
    return (*args[:first], args[first].detach().requires_grad_(), *args[first + 1 :])
