"""The training loss at the positions that have labels, without the logits of all others.

The base runs as usual up to its output head. There a tap keeps the hidden states and computes nothing; those with a
label go through the frozen head in one fused operation (`kernels/linear_cross_entropy.py`). Where a model does more
with its logits, or its head is not frozen and plain, the model computes its loss itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..bases import architecture
from ..errors import UsageError
from ..kernels.activations import one_kernel
from ..kernels.linear_cross_entropy import linear_cross_entropy
from ..labels import IGNORED
from ..model import PeftModel
from ..runtime import packed_row, site
from ..runtime.frame import BOUNDARIES, Around, Frame, Place
from . import shared_virtual_tokens

logger = logging.getLogger(__name__)

EVEN = 8  # tokens of a packed row are a multiple of it: products of odd numbers of rows take up to a fifth longer
ENOUGH = 16  # columns before the first label, and from it on, that tell whether two losses are the same


class FusedLoss:
    """The loss of one handle's batches, fused where that is the same as the model's own.

    Args:
        handle: of a causal or an encoder-decoder language model; others are left to their own loss.
        comparing: see `Agreement`.
        tile: see `HeadLoss`.
    """

    def __init__(
        self,
        handle: PeftModel,
        comparing: Callable[[], AbstractContextManager[object]] = nullcontext,
        tile: int | None = None,
    ) -> None:
        self.handle = handle
        self.fused = HeadLoss(handle, tile)
        self.agreement = Agreement(self.fused, comparing)

    def __call__(self, inputs: dict[str, Any], items: Any = None, smoothing: float = 0.0) -> Tensor | None:
        """The loss of a batch with labels; None where the model is to compute it.

        Args:
            items: what the sum over labels is divided by; None divides by the number of labels.
            smoothing: share of each target that is spread over the vocabulary.
        """
        if not self._applies(inputs):
            return None
        frame = self.handle.effective_frame
        if self.handle.is_due(frame):
            self.agreement.forget()
        ways = (True, False) if shared_virtual_tokens.applies(self.handle, frame, inputs) else (False,)
        for shared in ways:
            if self.agreement.holds(inputs, shared):
                return self.fused(frame, inputs, items, smoothing, shared)
        return None

    def _applies(self, inputs: dict[str, Any]) -> bool:
        """Whether the head is plain, frozen and without adapters, and the batch is of the usual kind."""
        head, base = self.fused.head, self.fused.base
        if type(head) is not nn.Linear or head.weight.requires_grad or not head.weight.is_floating_point():
            return False
        if self.fused.encoder_decoder and not architecture.shifts_labels(base) and inputs.get("decoder_input_ids") is None:
            return False
        frame, at = self.handle.effective_frame, site.site_of(head)
        hooked = head._forward_hooks or head._forward_pre_hooks or hasattr(head, "_hf_hook")
        unusual = {"adapter_names", "shift_labels", "logits_to_keep"} & inputs.keys()
        return "labels" in inputs and not (hooked or unusual or (at is not None and frame.adapters.get(at)))


class Agreement:
    """Whether the fused loss of a handle is the model's own: found out once, on one row, by computing both.

    Models scale, cap or mask logits and add to their losses in ways that no list could name.

    Args:
        fused: computes the loss.
        comparing: makes the context in which both are computed; for those who measure it.

    Attributes:
        found: `{whether virtual tokens run once for all rows: whether the losses agree}`, as far as it is known.
    """

    def __init__(self, fused: HeadLoss, comparing: Callable[[], AbstractContextManager[object]] = nullcontext) -> None:
        self.fused = fused
        self.comparing = comparing
        self.found: dict[bool, bool] = {}

    def forget(self) -> None:
        """Other adapters act, or the handle's mode is another: compare anew."""
        self.found.clear()

    def holds(self, inputs: dict[str, Any], shared: bool) -> bool:
        """Whether the losses agree; a batch is needed where that is not known yet."""
        if shared not in self.found:
            with self.comparing():
                self.found[shared] = self._compare(inputs, shared)
            if not shared and not self.found[shared]:
                logger.info("%s computes its loss itself: the fused loss would differ", type(self.fused.base).__name__)
        return self.found[shared]

    def _compare(self, inputs: dict[str, Any], shared: bool) -> bool:
        """Compute both losses, with the same dropout, on a few labels of one row behind a few virtual tokens.

        Where rows share virtual tokens, it is two rows (of a packed batch, which is one, its first columns).
        """
        fused, handle = self.fused, self.fused.handle
        if architecture.changes_logits(fused.base.config):
            return False  # a comparison of small logits may not reveal it
        labels = inputs["labels"]
        labelled = (labels[:, 1:] if not fused.encoder_decoder else labels) != IGNORED
        if labels.dim() != 2 or not bool(labelled.any()):
            return False
        row, first = labelled.nonzero()[0].tolist()
        rows = sorted({row, (row + 1) % len(labels)}) if shared else [row]
        part = _cut(inputs, rows, max(first - ENOUGH, 0), first + ENOUGH)
        frame = handle.effective_frame
        frame = frame.with_prompts(tuple((prompt, min(tokens, ENOUGH)) for prompt, tokens in frame.prompts))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            own = handle.forward_within(frame, **part).loss
            own = None if own is None else own.detach()  # before as much is kept again for gradients
            torch.manual_seed(0)
            try:
                found = fused(frame, part, shared=shared)
            except UsageError:
                return False
        tolerance = 2e-2 if fused.head.weight.dtype.itemsize == 2 else 1e-3
        return own is not None and bool((found - own).abs() <= tolerance * own.abs().clamp(min=1))


class HeadLoss:
    """Computes the loss of one handle's batches at its frozen output head.

    Args:
        handle: of a language model; `head` is None where a base has no output head.
        tile: values that the fused operation exponentiates at a time; None is what suits the device.
    """

    def __init__(self, handle: PeftModel, tile: int | None = None) -> None:
        self.handle = handle
        self.tile = tile
        self.base: Any = handle.bare_base
        self.head: Any = architecture.output_head(self.base)
        self.encoder_decoder = architecture.is_encoder_decoder(architecture.config_of(self.base))
        kernels = ((module, one_kernel(module)) for module in self.base.modules() if not site.fault(module))
        self._activations = [(module, OneKernel(kernel)) for module, kernel in kernels if kernel is not None]

    def __call__(
        self, frame: Frame, inputs: dict[str, Any], items: Any = None, smoothing: float = 0.0, shared: bool = False
    ) -> Tensor:
        """The loss of a batch with labels, `()`.

        Args:
            frame: a frame of the handle.
            items, smoothing: see `FusedLoss`.
            shared: whether virtual tokens run once for all rows (`shared_virtual_tokens.py`).
        """
        hidden, labels = (self._hidden_behind_shared if shared else self._hidden)(frame, dict(inputs))
        labelled = labels != IGNORED
        chosen = labels[labelled]
        total = linear_cross_entropy(hidden[labelled], self.head.weight, self.head.bias, chosen, smoothing, self.tile)
        loss = total / (len(chosen) if items is None else items)
        for penalty in frame.penalties if self.handle.training else ():
            loss = loss + penalty().to(loss)
        return loss

    def _hidden(self, plain: Frame, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Hidden states before the head, `(B, T, dim)`, and the labels that they predict, `(B, T)`."""
        handle = self.handle
        frame, tap = self._tapped(plain)
        if inputs.get(BOUNDARIES) is not None:
            frame, inputs = handle.pack_inputs(frame, inputs, EVEN)
        with handle.entered(frame):
            inputs = handle.prepare_inputs(frame, inputs) if frame.prompts else inputs
            labels = inputs.pop("labels")
            if self.encoder_decoder and inputs.get("decoder_input_ids") is None:
                inputs["decoder_input_ids"] = self.base.prepare_decoder_input_ids_from_labels(labels)
            self.base(**{**inputs, "use_cache": False})
        if self.encoder_decoder:
            return tap.hidden, labels
        return tap.hidden[:, :-1], labels[:, 1:]

    def _hidden_behind_shared(self, plain: Frame, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The same, where virtual tokens run once: the last of them predicts the first label."""
        labels = inputs.pop("labels")
        frame, tap = self._tapped(plain)
        return shared_virtual_tokens.run(self.handle, frame, inputs, tap, EVEN), labels

    def _tapped(self, plain: Frame) -> tuple[Frame, Tap]:
        """A frame whose output head is tapped and whose activations are single kernels, and the tap."""
        tap = Tap()
        around: dict[Place, Any] = {site.install(module): (kernel,) for module, kernel in self._activations}
        return Frame({**around, **plain.adapters, site.install(self.head): (tap,)}, plain.prompts, names=plain.names), tap


class Tap(Around):
    """Around the output head: keeps what comes in, and gives logits of an empty vocabulary."""

    hidden: Tensor

    def __call__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        (self.hidden,) = (*args, *kwargs.values())
        return self.hidden[..., :0]


class OneKernel(Around):
    """Around an activation that takes several passes over memory: computes it in one (`kernels/activations.py`)."""

    def __init__(self, kernel: Callable[[Tensor], Tensor]) -> None:
        self.kernel = kernel

    def __call__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.kernel(*args, **kwargs)


def _cut(inputs: dict[str, Any], rows: list[int], start: int, stop: int) -> dict[str, Any]:
    """Some rows of a batch, and some of its labels' columns."""
    rows_in, columns_in = inputs["labels"].shape
    cut = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.shape[:1] == (rows_in,):
            value = value[rows]
            if value.shape[1:2] == (columns_in,):
                value = value[:, start:stop]
        cut[name] = value
    return {**cut, **packed_row.cut(inputs, start, stop)}
