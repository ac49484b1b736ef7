"""Which adapters act during the current call, per thread.

A `Frame` maps each site to the adapters that act there. It is immutable once made, so one frame serves any number of
threads and calls. Outside any frame, every site computes exactly what its module computed before.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..adapter import Adapter, PromptAdapter
from .own_state import OwnState

BASE_ROW = "__base__"  # in `adapter_names`, a row without an adapter
BOUNDARIES = "cu_seq_lens_q"
PACKED_KEYS = (BOUNDARIES, "cu_seq_lens_k", "max_length_q", "max_length_k")  # as transformers' collators name them


class Place(Protocol):
    """Where a frame's adapters act: a `Site`, of which a frame needs only its module."""

    @property
    def module(self) -> Callable[[], nn.Module | None]: ...

    def __hash__(self) -> int: ...


@dataclass(frozen=True, eq=False)
class Frame:
    """`{site: adapters}` for one call.

    Args:
        adapters: the adapters at each site, the one nearest to the base module first.
        prompts: the adapters on the model's inputs, each with its number of virtual tokens.
        fired: if given, collects the sites that were reached (for the check of the first training step).
        mixture: if the rows of a batch have different adapters, the frames of its parts; `adapters` is then empty.
        penalties: terms added to the loss in training.
        names: the effective adapters.
        segments: the boundaries of the texts of a packed row.
        state: what the handle sets on the base's modules while it runs; each handle has one, so it identifies the handle.
        training: the handle's mode.
    """

    adapters: dict[Place, tuple[Adapter | Around | Replacement, ...]]
    prompts: tuple[tuple[PromptAdapter, int], ...] = ()
    fired: set[Place] | None = None
    mixture: Mixture | None = None
    penalties: tuple[Callable[[], Tensor], ...] = ()
    names: tuple[str, ...] = ()
    segments: Segments | None = None
    state: OwnState | None = None
    training: bool = False

    def recording(self, fired: set[Place]) -> Frame:
        """This frame, recording the sites that it reaches in `fired`."""
        mixture = self.mixture
        if mixture is not None:
            mixture = Mixture([frame.recording(fired) for frame in mixture.frames], mixture.groups)
        return replace(self, fired=fired, mixture=mixture)

    def with_prompts(self, prompts: tuple[tuple[PromptAdapter, int], ...]) -> Frame:
        """This frame with other virtual tokens."""
        return replace(self, prompts=prompts)

    def wrapping(self, place: Place, around: Around) -> Frame:
        """This frame with a wrapper around a module's call, for rows of all parts."""
        if self.mixture is not None:
            parts = [part.wrapping(place, around) for part in self.mixture.frames]
            return replace(self, mixture=Mixture(parts, self.mixture.groups))
        return replace(self, adapters=self.adapters | {place: (*self.adapters.get(place, ()), around)})

    def unwrapped(self) -> Frame:
        """This frame without wrappers."""
        if self.mixture is not None:
            return replace(self, mixture=Mixture([part.unwrapped() for part in self.mixture.frames], self.mixture.groups))
        rest: dict[Place, tuple[Adapter | Around | Replacement, ...]]
        rest = {place: tuple(one for one in group if not isinstance(one, Around)) for place, group in self.adapters.items()}
        return replace(self, adapters=rest)

    def packed(self, segments: Segments, attentions: dict[Place, Replacement]) -> Frame:
        """This frame for a packed row, with these attentions in place of the base's; the row includes its virtual tokens."""
        adapters = self.adapters | {site: (*self.adapters.get(site, ()), other) for site, other in attentions.items()}
        return replace(self, adapters=adapters, prompts=(), segments=segments)


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
        """Which of `n = max(counts)` virtual tokens each row has, `(length, n)`; a row's own tokens are the last ones.

        Args:
            counts: number of virtual tokens of each part.
            length: number of rows, a multiple of the batch size (beams).
        """
        groups, inverse = self.rows(length)
        n = max(counts)
        columns = torch.arange(n, device=inverse.device)
        return torch.cat([(columns >= n - count).expand(len(rows), -1) for count, rows in zip(counts, groups)])[inverse]

    def stacked(self, values: list[Tensor | None], dims: int, length: int) -> Tensor:
        """Virtual tokens of each part as one tensor over the rows, `(length, ..., n, dim)`, shorter ones padded in front.

        Args:
            values: for each part `(..., n_i, dim)`, shared by its rows, or `(rows_i, ..., n_i, dim)`; None if the part
                has none.
            dims: number of dimensions of the shared form.
            length: number of rows, a multiple of the batch size (beams).
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
        """The groups' indices in a tensor of `length` rows, and the permutation that undoes their concatenation.

        Beams and flattened tokens follow each other row by row, so `length` may be a multiple of the batch size;
        a length of 1 stands for a value that all rows share.
        """
        if length not in self._by_length:
            each = max(length // self.size, 1)
            groups = [(rows[:, None] * each + torch.arange(each, device=rows.device)).flatten() for rows in self.groups]
            self._by_length[length] = groups, torch.cat(groups).argsort()
        return self._by_length[length]


class Segments:
    """The boundaries of the texts of one packed row.

    Args:
        boundaries: `(texts + 1,)`, from 0 to the row's length.
        longest: number of tokens of the longest text, if known.
    """

    def __init__(self, boundaries: Tensor, longest: int | None = None) -> None:
        self.boundaries = boundaries.to(torch.int32)
        self._longest = longest

    @classmethod
    def of(cls, inputs: dict[str, Any]) -> Segments:
        """Read from a packed call's keyword arguments."""
        return cls(inputs[BOUNDARIES], inputs.get("max_length_q"))

    @functools.cached_property
    def lengths(self) -> list[int]:
        """Number of tokens of each text; reading it from an accelerator synchronizes."""
        return self.boundaries.diff().tolist()

    @property
    def longest(self) -> int:
        return max(self.lengths) if self._longest is None else self._longest


class Around:
    """A wrapper around a module's call, in addition to its adapters: `around(call, *args, **kwargs)`."""

    def __call__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def by_rows(self, parts: list[Any], mixture: Mixture, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The call of a mixed batch.

        Args:
            parts: this module's wrapper for each part of the mixture, of this object's type; None if a part has none.
        """
        raise NotImplementedError


class Replacement:
    """Makes a view of a module that is called in its place: `replacement(module)`."""

    def __call__(self, module: nn.Module) -> nn.Module:
        raise NotImplementedError


class _Local(threading.local):
    def __init__(self) -> None:
        self.frame: Frame | None = None
        self.gradients = False
        self.running: Place | None = None
        self.kept: dict[Any, Any] = {}


_local = _Local()


def current_frame() -> Frame | None:
    """The frame of this thread's innermost handle call, or None."""
    return _local.frame


FRAME = "_tunesmith_frame"  # attribute of a node of autograd


def remember_frame(node: Any) -> None:
    """Let a new node of a `torch.autograd.Function` keep the current frame for its backward pass (`recompute.py`).

    Functions that call no modules, ours for example, say so and need none.
    """
    frame = _local.frame
    if frame is not None and not getattr(node._forward_cls, "calls_no_modules", False):
        setattr(node, FRAME, frame)


def began_with_gradients() -> bool:
    """Whether gradients were recorded when the current frame was entered."""
    return _local.gradients


def running_site() -> Place | None:
    """The site whose adapters compute now, on this thread: what it reads of its module is the base's own."""
    return _local.running


def kept_reads() -> dict[Any, Any]:
    """What `reads.py` keeps until the current frame is left."""
    return _local.kept


def set_running(site: Place | None) -> Place | None:
    """Makes `site` this thread's running one; returns the one before."""
    before, _local.running = _local.running, site
    return before


class entered:
    """Context manager: makes `frame` this thread's current frame, and restores the previous one afterwards.

    While it is held, the modules of the base are in the state that the frame's handle has set for them.
    Never hold one across a `yield`: the caller of a suspended generator would run in that frame.

    Args:
        state: whether modules will be called.
        gradients: whether gradients are recorded; by default torch says so.
        traced: whether `torch.compile` traces the call. (Asked here, `is_compiling()` made torch 2.13 drop what is set below.)
    """

    def __init__(self, frame: Frame | None, state: bool = True, gradients: bool | None = None, traced: bool = False) -> None:
        self.frame = frame
        self.state = frame.state if frame is not None and state else None
        self.gradients = gradients
        self.traced = traced
        self.previous: Frame | None = None
        self.before = False
        self.turn: Any = None

    def __enter__(self) -> Frame | None:
        self.previous, self.before = _local.frame, _local.gradients
        if self.state is not None:
            assert self.frame is not None
            if (
                self.previous is not None
                and self.previous.state is self.state
                and self.previous.training == self.frame.training
            ):
                self.state = None
            else:
                self.turn = self.state.enter(self.frame.training, self.traced)
        _local.frame = self.frame
        _local.gradients = torch.is_grad_enabled() if self.gradients is None else self.gradients
        return self.frame

    def __exit__(self, *_: object) -> None:
        _local.frame, _local.gradients = self.previous, self.before
        if _local.kept:
            _local.kept.clear()
        if self.state is not None:
            self.state.leave(self.turn, self.traced)
