"""The training loss at the positions that have labels, without the logits of all others.

The base runs as usual up to its output head. There a tap keeps the hidden states and computes nothing; those with a
label go through the frozen head in one fused operation (`kernels/linear_cross_entropy.py`). `known_loss.py` says where this
is the model's own loss; elsewhere the model computes it.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..bases import architecture
from ..handle import preflight
from ..kernels.activations import one_kernel
from ..kernels.linear_cross_entropy import linear_cross_entropy
from ..labels import IGNORED
from ..model import PeftModel
from ..runtime import site
from ..runtime.frame import BOUNDARIES, Around, Frame, Place
from . import known_loss, shared_virtual_tokens

logger = logging.getLogger(__name__)

EVEN = 8  # tokens of a packed row are a multiple of it: products of odd numbers of rows take up to a fifth longer


class FusedLoss:
    """The loss of one handle's batches, fused where it is known to be the model's own (`known_loss.py`).

    Args:
        handle: of any model; those whose loss is not known compute it themselves.
        tile: see `HeadLoss`.
    """

    def __init__(self, handle: PeftModel, tile: int | None = None) -> None:
        self.handle = handle
        self.fused = HeadLoss(handle, tile)
        self._told: set[str] = set()

    def __call__(self, inputs: dict[str, Any], items: Any = None, smoothing: float = 0.0) -> Tensor | None:
        """The loss of a batch with labels; None where the model is to compute it.

        Args:
            items: what the sum over labels is divided by; None divides by the number of labels.
            smoothing: share of each target that is spread over the vocabulary.
        """
        handle, base = self.handle, self.fused.base
        frame = handle.effective_frame
        with handle.entered():  # what the handle sets on its base's modules is there while it runs
            reason = known_loss.fault(handle, base, frame, inputs)
        if reason is None:
            return self.fused(frame, inputs, items, smoothing, shared_virtual_tokens.applies(handle, frame, inputs))
        if reason not in self._told:
            self._told.add(reason)
            logger.info("%s computes its loss itself: %s", type(base).__name__, reason)
        return None


class HeadLoss:
    """Computes the loss of one handle's batches at its frozen output head.

    Args:
        handle: of a language model.
        tile: values that the fused operation exponentiates at a time; None is what suits the device.
    """

    def __init__(self, handle: PeftModel, tile: int | None = None) -> None:
        self.handle = handle
        self.tile = tile
        self.base: Any = handle.bare_base
        self.encoder_decoder = architecture.is_encoder_decoder(architecture.config_of(self.base))
        kernels = ((module, one_kernel(module)) for module in self.base.modules() if not site.fault(module))
        self._activations = [(module, OneKernel(kernel)) for module, kernel in kernels if kernel is not None]

    @property
    def head(self) -> Any:
        """The base's output head; None if it has none."""
        return architecture.output_head(self.base)

    def __call__(
        self, frame: Frame, inputs: dict[str, Any], items: Any = None, smoothing: float = 0.0, shared: bool = False
    ) -> Tensor:
        """The loss of a batch with labels, `()`.

        Args:
            frame: a frame of the handle.
            items, smoothing: see `FusedLoss`.
            shared: whether virtual tokens run once for all rows (`shared_virtual_tokens.py`).
        """
        handle, penalties = self.handle, frame.penalties if self.handle.training else ()
        frame, tap = self._tapped(frame)
        if inputs.get(BOUNDARIES) is not None and not shared:
            frame, inputs = handle.pack_inputs(frame, inputs, EVEN)
        run = functools.partial(self._hidden_behind_shared if shared else self._hidden, tap, inputs)
        hidden, labels = preflight.checked(handle, frame, "forward", run) if handle.is_due(frame) else run(frame)
        labelled, head = labels != IGNORED, self.head
        chosen, seen = labels[labelled], hidden[labelled].to(head.weight.dtype)  # as autocast would
        total = linear_cross_entropy(seen, head.weight, head.bias, chosen, smoothing, self.tile)
        loss = total / (len(chosen) if items is None else items)
        for penalty in penalties:
            loss = loss + penalty().to(loss)
        return loss

    def _hidden(self, tap: Tap, inputs: dict[str, Any], frame: Frame) -> tuple[Tensor, Tensor]:
        """Hidden states before the head, `(B, T, dim)`, and the labels that they predict, `(B, T)`."""
        with self.handle.entered(frame):
            inputs = dict(self.handle.prepare_inputs(frame, inputs) if frame.prompts else inputs)
            labels = inputs.pop("labels")
            if self.encoder_decoder and inputs.get("decoder_input_ids") is None:
                inputs["decoder_input_ids"] = self.base.prepare_decoder_input_ids_from_labels(labels)
            self.base(**{**inputs, "use_cache": False})
        if self.encoder_decoder:
            return tap.hidden, labels
        return tap.hidden[:, :-1], labels[:, 1:]

    def _hidden_behind_shared(self, tap: Tap, inputs: dict[str, Any], frame: Frame) -> tuple[Tensor, Tensor]:
        """The same, where virtual tokens run once: the last of them predicts the first label."""
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        return shared_virtual_tokens.run(self.handle, frame, inputs, tap, EVEN), labels

    def _tapped(self, plain: Frame) -> tuple[Frame, Tap]:
        """A frame whose output head is tapped and whose activations are single kernels, and the tap."""
        tap = Tap()
        around: dict[Place, Any] = {site.install(module): (kernel,) for module, kernel in self._activations}
        return replace(plain, adapters={**around, **plain.adapters, site.install(self.head): (tap,)}), tap


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
