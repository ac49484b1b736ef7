"""The memory of a training's steps.

    peak = program + base + adapter + gradients + moments + (1 + gaps) transient

- base: in its type, or in its stored form (`bases/stored_bytes.py`).
- adapter, gradients and moments: `4 + 4 + 2 * 4` bytes for each trained value under AdamW in 32 bits.
- transient: what lives between the steps' operations (activations kept for the backward pass, logits, gradients of
  activations), counted by running the steps on meta tensors (`ledger.py`): the handle, the loss and the kernels are the
  ones that train. The first step is heavier than others, because the loss is computed in two ways there and compared.
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
from ..train.fused_loss import LiveLoss
from .ledger import Ledger
from .skeleton import skeleton

# Python, torch, transformers and a Trainer, and what kernels keep: measured on Linux. On a GPU its context (not measured here).
PROGRAM = {"cpu": 550 * 2**20, "cuda": 500 * 2**20}
GAPS = {"cpu": 0.4, "cuda": 0.1}  # glibc: benchmarks/results/speed.jsonl; torch's caching allocator: not measured here
Example = dict[str, list[int]]


@dataclass(frozen=True)
class Storage:
    """How the base and the optimiser's moments are stored."""

    dtype: torch.dtype = torch.bfloat16
    bits: int = 16
    double_quantisation: bool = True
    bytes_of_moments: int = 8


@dataclass(frozen=True)
class Plan:
    """Bytes, values and work of a training; a step is one batch forward and backward."""

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
    *,
    gradient_checkpointing: bool = False,
    packing: bool | None = None,
    held_out: Sequence[Example] = (),
    device: str = "cpu",
) -> Plan:
    """What training on some batches takes.

    Args:
        config: transformers' configuration of the base.
        batches: the first step's batch, then others, the largest among them; `input_ids` and `labels` of each row.
        held_out: rows that are evaluated before and after.
        device: "cpu" or "cuda".

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
        if gradient_checkpointing:
            architecture.enable_recomputing(handle)
        trained = [parameter for parameter in handle.parameters() if parameter.requires_grad]
        adapter = sum(parameter.numel() * parameter.element_size() for parameter in handle.adapters.parameters())
        count = sum(parameter.numel() for parameter in trained)
        base, decoded = _stored(model, dense, storage)
        held = ledger.live
        activations = flops = moved = 0
        loss_of, ledger.slack = CountedLoss(handle, ledger, device), GAPS[device]
        for batch in batches:
            between, flops_of, moved_of = _step(ledger, handle, loss_of, _collated(handle, packing, batch))
            activations, flops, moved = max(activations, between - held), max(flops, flops_of), max(moved, moved_of)
            for parameter in trained:
                parameter.grad = None
        transient = max(ledger.peaks["check"], ledger.peaks["step"]) - held
        evaluation = 0
        if held_out:
            with ledger, ledger.phase("evaluation"):
                mean_loss(handle, held_out, 0)
            evaluation = ledger.peaks["evaluation"] - held + decoded
    return Plan(
        program=PROGRAM[device],
        base=base,
        adapter=adapter,
        gradients=4 * count,
        moments=storage.bytes_of_moments * count,
        activations=activations,
        working=max(transient - activations - 4 * count, 0) + decoded,
        evaluation=evaluation,
        trainable=count,
        total=handle.get_nb_trainable_parameters()[1],
        tokens=max(sum(_length(row) for row in batch) for batch in batches),
        flops=flops,
        moved=moved,
    )


class CountedLoss(LiveLoss):
    """The loss, with its comparison in the first step apart: no memory was freed before it."""

    def __init__(self, handle: PeftModel, ledger: Ledger, device: str) -> None:
        super().__init__(handle)
        self.tile = tile_on(device)  # meta tensors are taken in the tiles in which the device takes real ones
        self.ledger = ledger
        self.before = (0, 0)

    def _agrees(self, inputs: dict[str, Any], shared: bool) -> bool:
        ledger, slack = self.ledger, self.ledger.slack
        ledger.slack = 0.0
        with ledger.phase("check"):
            same = super()._agrees(inputs, shared)
        ledger.slack, self.before = slack, (ledger.flops, ledger.moved)
        return same


def _step(ledger: Ledger, handle: PeftModel, loss_of: CountedLoss, inputs: dict[str, Any]) -> tuple[int, int, int]:
    """`(bytes held between the two passes, flops, bytes moved)` of one step."""
    loss_of.before = (ledger.flops, ledger.moved)
    with ledger, ledger.phase("step"):
        loss = loss_of(inputs)
        if loss is None:
            loss = handle(**inputs).loss
        between = ledger.live
        loss.backward()
    return between, ledger.flops - loss_of.before[0], ledger.moved - loss_of.before[1]


def _collated(handle: PeftModel, packing: bool | None, batch: Sequence[Example]) -> dict[str, Any]:
    """A batch as a job makes it; encoder-decoders and speech have two texts a row."""
    config: Any = handle.base_model.config
    if not architecture.is_encoder_decoder(config):
        collator = batching(handle, packing, 0)[1]
        assert isinstance(collator, (PackedCollator, PadRight))
        return dict(collator(batch))
    rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in batch]
    inputs = {name: value for name, value in PadRight(0)(rows).items() if name != "labels"}
    labels = PadRight(IGNORED)([{"input_ids": row["labels"]} for row in batch])["input_ids"]
    if architecture.hears(config):
        sound = torch.empty(len(batch), *architecture.sound_shape(config), device="meta")
        return {"input_features": sound.to(handle.base_model.dtype), "labels": labels}
    return {**inputs, "labels": labels}


def _length(row: Example) -> int:
    ids, labels = row["input_ids"], row.get("labels", row["input_ids"])
    return len(ids) if len(ids) == len(labels) else len(ids) + len(labels)


def _stored(model: Any, dense: int, storage: Storage) -> tuple[int, int]:
    """`(bytes of the base as it is stored, bytes of the largest weight while it is decoded)`."""
    if storage.bits == 16:
        return dense, 0
    head = architecture.output_head(model)
    linear = [module.weight for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    form = "int8" if storage.bits == 8 else "nf4 nested" if storage.double_quantisation else "nf4"
    stored = sum(stored_bytes(form, *weight.shape) for weight in linear)
    return dense - sum(weight.nbytes for weight in linear) + stored, max(weight.nbytes for weight in linear)


def _without_tokenizer(config: PeftConfig) -> PeftConfig:
    """Starting from a text takes as much memory as starting at random, and needs no tokenizer."""
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
