"""The training loss where labels are, without the logits of all other positions.

The base runs as always up to its output head. There a tap takes the hidden states and computes nothing; those with a
label go through the frozen head in one fused operation (`kernels/linear_cross_entropy.py`). Where a model does more
with its logits, or its head is not frozen and plain, the loss is the model's own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
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


class Tap(Around):
    """Around the output head: keeps what comes in, and gives logits of no words at all."""

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


class LiveLoss:
    """The loss of one handle's batches, fused where that is the same as the model's own.

    Whether it is the same is found out on one row, where both are computed: models scale, cap or mask logits and add to
    their losses in ways that no list could name.

    Args:
        handle: of a causal or an encoder-decoder language model; others are left to their own loss.
    """

    tile: int | None = None  # of the fused operation; None is what suits the device

    def __init__(self, handle: PeftModel) -> None:
        self.handle = handle
        self.base: Any = handle.base_model
        self.head: Any = architecture.output_head(self.base)
        self.encoder_decoder = architecture.is_encoder_decoder(architecture.config_of(self.base))
        self._same: bool | None = None
        self._shares: bool | None = None  # the same, where virtual tokens are computed once for all rows
        found = ((module, one_kernel(module)) for module in self.base.modules() if not site.fault(module))
        self._activations = [(module, OneKernel(kernel)) for module, kernel in found if kernel is not None]

    def __call__(self, inputs: dict[str, Any], items: Any = None, smoothing: float = 0.0) -> Tensor | None:
        """The loss of a batch with labels; None where the model's own is to be taken.

        Args:
            items: what the sum over labels is divided by; None divides by the number of labels.
            smoothing: share of each target that is spread over the vocabulary.
        """
        if not self._applies(inputs):
            return None
        frame = self.handle.frame
        if self.handle.is_due(frame):
            self._same = self._shares = None
        shared = shared_virtual_tokens.applies(self.handle, frame, inputs)
        if shared and self._shares is None:
            self._shares = self._agrees(inputs, shared=True)
        shared = shared and bool(self._shares)
        if not shared and self._same is None:
            self._same = self._agrees(inputs, shared=False)
            if not self._same:
                logger.info("the loss of %s is computed by the model itself", type(self.base).__name__)
        return self._fused(frame, inputs, items, smoothing, shared) if shared or self._same else None

    def _applies(self, inputs: dict[str, Any]) -> bool:
        """Whether the head is plain, frozen and without adapters, and the batch is of the usual kind."""
        if type(self.head) is not nn.Linear or self.head.weight.requires_grad or not self.head.weight.is_floating_point():
            return False
        if self.encoder_decoder and not architecture.shifts_labels(self.base) and inputs.get("decoder_input_ids") is None:
            return False
        frame, at = self.handle.frame, site.site_of(self.head)
        hooked = self.head._forward_hooks or self.head._forward_pre_hooks or hasattr(self.head, "_hf_hook")
        unusual = {"adapter_names", "shift_labels", "logits_to_keep"} & inputs.keys()
        return "labels" in inputs and not (hooked or unusual or (at is not None and frame.adapters.get(at)))

    def _agrees(self, inputs: dict[str, Any], shared: bool) -> bool:
        """Whether both ways give the same loss, with the same numbers dropped out, on a few labels of one row, behind a
        few virtual tokens.

        Where rows share virtual tokens, it is two rows (of a packed batch, which is one, its first columns).
        """
        if architecture.changes_logits(self.base.config):
            return False  # small logits show too little of it to be found out
        labels = inputs["labels"]
        live = (labels[:, 1:] if not self.encoder_decoder else labels) != IGNORED
        if labels.dim() != 2 or not bool(live.any()):
            return False
        row, first = live.nonzero()[0].tolist()
        rows = sorted({row, (row + 1) % len(labels)}) if shared else [row]
        one = _cut(inputs, rows, max(first - ENOUGH, 0), first + ENOUGH)
        frame = self.handle.frame
        frame = frame.with_prompts(tuple((prompt, min(tokens, ENOUGH)) for prompt, tokens in frame.prompts))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            own = self.handle.forward_within(frame, **one).loss
            own = None if own is None else own.detach()  # before as much is kept again for gradients
            torch.manual_seed(0)
            try:
                fused = self._fused(frame, one, None, 0.0, shared)
            except UsageError:
                return False
        tolerance = 2e-2 if self.head.weight.dtype.itemsize == 2 else 1e-3
        return own is not None and bool((fused - own).abs() <= tolerance * own.abs().clamp(min=1))

    def _fused(self, plain: Frame, inputs: dict[str, Any], items: Any, smoothing: float, shared: bool) -> Tensor:
        """The loss of a batch in a handle's frame."""
        handle, tap = self.handle, Tap()
        around: dict[Place, Any] = {site.install(module): (kernel,) for module, kernel in self._activations}
        frame = Frame({**around, **plain.adapters, site.install(self.head): (tap,)}, plain.prompts, names=plain.names)
        inputs = dict(inputs)
        if shared:
            labels = inputs.pop("labels")
            hidden = shared_virtual_tokens.run(handle, frame, inputs, tap, EVEN)  # (B, T, dim)
        else:
            if inputs.get(BOUNDARIES) is not None:
                frame, inputs = handle.pack(frame, inputs, EVEN)
            with handle.entered(frame):
                inputs = handle.prepare(frame, inputs) if frame.prompts else inputs
                labels = inputs.pop("labels")
                if self.encoder_decoder and inputs.get("decoder_input_ids") is None:
                    inputs["decoder_input_ids"] = self.base.prepare_decoder_input_ids_from_labels(labels)
                self.base(**{**inputs, "use_cache": False})
            hidden = tap.hidden  # (B, T, dim)
            if not self.encoder_decoder:
                hidden, labels = hidden[:, :-1], labels[:, 1:]
        live = labels != IGNORED
        chosen = labels[live]
        total = linear_cross_entropy(hidden[live], self.head.weight, self.head.bias, chosen, smoothing, self.tile)
        loss = total / (len(chosen) if items is None else items)
        for penalty in plain.penalties if handle.training else ():
            loss = loss + penalty().to(loss)
        return loss


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
