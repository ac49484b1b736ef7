"""The memory that the steps of a training run take.

    peak = program + base + adapter + gradients + moments + (1 + gaps) transient

- base: in its type, or in its stored form (`bases/stored_bytes.py`).
- adapter, gradients and moments: `4 + 4 + 2 * 4` bytes for each trained value under AdamW in 32 bits.
- transient: what comes and goes within a step (activations kept for the backward pass, logits, gradients of
  activations), counted by running steps on meta tensors (`ledger.py`) with the handle, the loss and the kernels that
  train. The first step is heavier than others, because two ways to compute the loss are compared in it.
- gaps: freed memory that a heap keeps between blocks. Nothing in the first step; after it, as much as measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..bases import architecture
from ..bases.stored_bytes import stored_bytes
from ..config import PeftConfig
from ..data.packing import PackedCollator
from ..data.text import PadRight, mean_loss
from ..errors import TunesmithError, UsageError
from ..kernels.linear_cross_entropy import tile_on
from ..labels import IGNORED
from ..methods.prompt_tuning import PromptTuningConfig, PromptTuningInit
from ..model import PeftModel, get_peft_model
from ..train.batching import batching
from ..train.fused_loss import FusedLoss
from .ledger import Ledger
from .skeleton import skeleton

# Python, torch, transformers, a Trainer, and what kernels keep: measured on Linux. On a GPU, its context (not measured).
PROGRAM = {"cpu": 550 * 2**20, "cuda": 500 * 2**20}
GAPS = {"cpu": 0.4, "cuda": 0.1}  # glibc: benchmarks/results/speed.jsonl; torch's caching allocator: not measured
Example = dict[str, list[int]]


@dataclass(frozen=True)
class Storage:
    """Where and how a training run keeps its values.

    Args:
        dtype: of the base and its activations.
        bits: of the base's linear weights: 4, 8, or 16 for `dtype`.
        double_quantisation: whether the scales of 4-bit weights are quantised, too.
        bytes_of_moments: of the optimiser's moments, for each trained value.
        gradient_checkpointing: whether activations are recomputed in the backward pass rather than kept.
        device: "cpu" or "cuda".
    """

    dtype: torch.dtype = torch.bfloat16
    bits: int = 16
    double_quantisation: bool = True
    bytes_of_moments: int = 8
    gradient_checkpointing: bool = False
    device: str = "cpu"


@dataclass(frozen=True)
class Plan:
    """Bytes, values and work of a training run; a step is one batch forward and backward."""

    program: int
    base: int
    adapter: int
    gradients: int
    moments: int
    activations: int
    working: int
    evaluation: int
    trainable: int
    total: int
    tokens: int
    flops: int
    moved: int

    @property
    def held(self) -> int:
        """What stays from step to step."""
        return self.program + self.base + self.adapter + self.gradients + self.moments

    @property
    def peak(self) -> int:
        return self.held + max(self.activations + self.working, self.evaluation)


def predict(
    config: Any,
    peft_config: PeftConfig,
    batches: Sequence[Sequence[Example]],
    storage: Storage,
    held_out: Sequence[Example] = (),
    packing: bool | None = None,
) -> Plan:
    """What training on some batches takes.

    Args:
        config: transformers' configuration of the base.
        batches: the first step's batch, then others, the largest among them; `input_ids` and `labels` of each row.
        held_out: rows that are evaluated before and after.
        packing: see `train/batching.py`.

    Raises:
        ConfigError, TargetError: the adapter does not fit the base.
        UsageError: the model does something that has no shape without values.
    """
    ledger = Ledger()
    model = skeleton(config, storage.dtype)
    dense = ledger.hold([*model.parameters(), *model.buffers()])
    with _explained(str(architecture.model_type(config))):
        with ledger:
            handle = get_peft_model(model, _without_tokenizer(peft_config)).train()
        if storage.gradient_checkpointing:
            architecture.enable_recomputing(handle)
        base, decoded = _stored(model, dense, storage)
        steps = Steps(handle, ledger, storage.device)
        for batch in batches:
            steps.take(_collated(handle, packing, batch))
        evaluation = steps.evaluate(held_out)
    count = sum(parameter.numel() for parameter in steps.trained)
    return Plan(
        program=PROGRAM[storage.device],
        base=base,
        adapter=sum(parameter.numel() * parameter.element_size() for parameter in handle.adapters.parameters()),
        gradients=4 * count,
        moments=storage.bytes_of_moments * count,
        activations=steps.activations,
        working=max(steps.transient - steps.activations - 4 * count, 0) + decoded,
        evaluation=evaluation + decoded if held_out else 0,
        trainable=count,
        total=handle.get_nb_trainable_parameters()[1],
        tokens=max(sum(_length(row) for row in batch) for batch in batches),
        flops=steps.flops,
        moved=steps.moved,
    )


class Steps:
    """Steps of a handle on meta tensors, counted.

    Args:
        device: the one that is planned for, "cpu" or "cuda".

    Attributes:
        activations: bytes held between the two passes.
        flops, moved: the work of one step.
    """

    def __init__(self, handle: PeftModel, ledger: Ledger, device: str) -> None:
        self.handle = handle
        self.ledger = ledger
        self.trained = [parameter for parameter in handle.parameters() if parameter.requires_grad]
        self.activations = self.flops = self.moved = 0
        self._loss_of = FusedLoss(handle, tile_on(device))
        self._held = ledger.live
        ledger.slack = GAPS[device]

    @property
    def transient(self) -> int:
        """Bytes that come and go within a step."""
        return self.ledger.peaks["step"] - self._held

    def take(self, inputs: dict[str, Any]) -> None:
        """One step; the attributes are those of the largest step so far."""
        ledger = self.ledger
        flops, moved = ledger.flops, ledger.moved
        with ledger, ledger.phase("step"):
            loss = self._loss_of(inputs)
            if loss is None:
                loss = self.handle(**inputs).loss
            between = ledger.live - self._held
            loss.backward()
        self.activations = max(self.activations, between)
        self.flops, self.moved = max(self.flops, ledger.flops - flops), max(self.moved, ledger.moved - moved)
        for parameter in self.trained:
            parameter.grad = None

    def evaluate(self, rows: Sequence[Example]) -> int:
        """Bytes that come and go while rows are evaluated."""
        if not rows:
            return 0
        with self.ledger, self.ledger.phase("evaluation"):
            mean_loss(self.handle, rows, 0)
        return self.ledger.peaks["evaluation"] - self._held


def _collated(handle: PeftModel, packing: bool | None, batch: Sequence[Example]) -> dict[str, Any]:
    """A batch as a job makes it; rows of encoder-decoders and of speech models have a source and a target."""
    config: Any = handle.bare_base.config
    if not architecture.is_encoder_decoder(config):
        collator = batching(handle, packing, 0)[1]
        assert isinstance(collator, (PackedCollator, PadRight))
        return dict(collator(batch))
    rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in batch]
    inputs = {name: value for name, value in PadRight(0)(rows).items() if name != "labels"}
    labels = PadRight(IGNORED)([{"input_ids": row["labels"]} for row in batch])["input_ids"]
    if architecture.is_speech_model(config):
        sound = torch.empty(len(batch), *architecture.spectrogram_shape(config), device="meta")
        return {"input_features": sound.to(handle.bare_base.dtype), "labels": labels}
    return {**inputs, "labels": labels}


def _length(row: Example) -> int:
    ids, labels = row["input_ids"], row.get("labels", row["input_ids"])
    return len(ids) if len(ids) == len(labels) else len(ids) + len(labels)


def _stored(model: Any, dense: int, storage: Storage) -> tuple[int, int]:
    """`(bytes of the base as it is stored, bytes of its largest weight once decoded)`."""
    if storage.bits == 16:
        return dense, 0
    head = architecture.output_head(model)
    linear = [module.weight for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    form = "int8" if storage.bits == 8 else "nf4 nested" if storage.double_quantisation else "nf4"
    stored = sum(stored_bytes(form, *weight.shape) for weight in linear)
    return dense - sum(weight.nbytes for weight in linear) + stored, max(weight.nbytes for weight in linear)


def _without_tokenizer(config: PeftConfig) -> PeftConfig:
    """The same with random initial values, which take as much memory as those of a text and need no tokenizer."""
    if isinstance(config, PromptTuningConfig):
        return replace(config, prompt_tuning_init=PromptTuningInit.RANDOM, prompt_tuning_init_text=None)
    return config


@contextmanager
def _explained(kind: str) -> Iterator[None]:
    try:
        yield
    except TunesmithError:
        raise
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(f"a {kind} model with this adapter cannot be planned without its weights ({reason})") from error
