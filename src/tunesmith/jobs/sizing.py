"""Memory planned for a job's settings, and settings that fit into a given amount of memory."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..bases import architecture
from ..bases.precision import dtype_named
from ..config import TaskType
from ..errors import ConfigError, TunesmithError
from ..estimate.machine import available_memory
from ..estimate.predict import Example, Plan, Storage, predict
from ..estimate.skeleton import config_of
from .settings import Settings

SHORTEST = 64  # tokens; no proposal truncates rows to fewer
VALUES_PER_LAYER = 60  # more than a layer keeps for the backward pass, in units of its width
UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class Rows:
    """What is known about the data: the number of rows, and their token ids and labels if they could be read."""

    count: int
    examples: Sequence[Example] = ()

    def batch(self, size: int, length: int) -> list[Example]:
        """The longest rows: the largest batch that can occur."""
        size = min(size, self.count)
        if not self.examples:
            return [{"input_ids": [0] * length, "labels": [0] * length}] * size
        cut = [{name: ids[:length] for name, ids in example.items()} for example in self.examples]
        live = [example for example in cut if any(label >= 0 for label in example["labels"][1:])]
        return sorted(live or cut, key=lambda example: -len(example["input_ids"]))[:size]

    def tokens(self, length: int) -> int:
        """Of one pass over the rows."""
        if not self.examples:
            return self.count * length
        return sum(min(len(example["input_ids"]), length) for example in self.examples)


def bytes_of(text: str) -> int:
    """`24GB` or `16 GiB` as bytes.

    Raises:
        ConfigError: it is not a size.
    """
    plain = text.replace(" ", "").upper()
    unit = next((unit for unit in sorted(UNITS, key=len, reverse=True) if plain.endswith(unit)), "")
    try:
        size = float(plain.removesuffix(unit)) * UNITS[unit]
    except (ValueError, KeyError):
        size = math.nan
    if not 0 < size < math.inf:
        raise ConfigError(f'"{text}" is not a memory size; write 24GB or 16GiB')
    return int(size)


def plan_training(settings: Settings, rows: Rows | None = None, device: str | None = None) -> Plan:
    """The memory and work that a job takes, in seconds, without a download and without weights.

    Args:
        settings: as for `tunesmith train`; the base by a known name, folder, config file or Hub id.
        rows: the data; None stands for 1,000 rows of `max_length` tokens.
        device: "cpu" or "cuda"; None stands for the device that this machine would train on.

    Raises:
        ConfigError, TargetError: method and base do not fit.
        UsageError: the base is unknown.
    """
    rows, device = rows or Rows(1000), device or usual_device()
    config = config_of(settings.base)
    config.use_cache = False
    peft_config = settings.peft_config(settings.base)
    if architecture.is_encoder_decoder(config):
        peft_config = dataclasses.replace(peft_config, task_type=TaskType.SEQ_2_SEQ_LM)
        held_out: list[Example] = []
    else:
        held_out = rows.batch(16, settings.room) if settings.held_out else []
    return predict(
        config,
        peft_config,
        [rows.batch(settings.per_device_train_batch_size, settings.room)],
        storage_of(settings, config, device),
        held_out=held_out,
        packing=settings.packing,
    )


def storage_of(settings: Settings, config: Any, device: str) -> Storage:
    """Where and how a job keeps its values."""
    dtype = dtype_named(settings.dtype) if settings.dtype != "auto" or device == "cpu" else torch.bfloat16
    return Storage(
        dtype=dtype or architecture.stored_dtype(config) or torch.float32,
        bits=settings.bits,
        double_quantisation=settings.bnb_4bit_use_double_quant,
        bytes_of_moments=2 if "8bit" in settings.optim else 8,
        gradient_checkpointing=bool(settings.gradient_checkpointing),
        device=device,
    )


def usual_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def smaller(settings: Settings) -> Iterator[Settings]:
    """Settings that take less and less memory: smaller batches of the same steps, checkpointing, 4 bits, shorter rows."""
    now = settings
    while now.per_device_train_batch_size > 1:
        half = now.per_device_train_batch_size // 2
        times = now.gradient_accumulation_steps * now.per_device_train_batch_size // half
        now = dataclasses.replace(now, per_device_train_batch_size=half, gradient_accumulation_steps=times)
        yield now
    if not now.gradient_checkpointing:
        now = dataclasses.replace(now, gradient_checkpointing=True)
        yield now
    if now.bits == 16:
        now = dataclasses.replace(now, load_in_4bit=True)
        yield now
    while now.max_length // 2 >= SHORTEST + now.max_length - now.room:
        now = dataclasses.replace(now, max_length=now.max_length // 2)
        yield now


def fitting(
    settings: Settings, budget: int, rows: Rows | None = None, device: str | None = None
) -> tuple[Settings, Plan] | None:
    """The first of `smaller` whose peak is within the budget, and its plan; None if no settings are."""
    for candidate in smaller(settings):
        plan = plan_training(candidate, rows, device)
        if plan.peak <= budget:
            return candidate, plan
    return None


def needs_checkpointing(settings: Settings, base: Any) -> bool:
    """Whether a job's activations would not fit into the free memory beside its base, which is loaded.

    Nothing is planned where an upper bound shows that there is plenty.
    """
    free = available_memory(usual_device())
    if free is None or _most_transient(settings, base) < free / 2:
        return False
    try:
        plan = plan_training(dataclasses.replace(settings, gradient_checkpointing=False))
    except TunesmithError:
        return False
    return plan.peak - plan.program - plan.base > free


def _most_transient(settings: Settings, base: Any) -> int:
    """An upper bound of the bytes of a batch's activations and logits."""
    config = base.config
    tokens = settings.per_device_train_batch_size * settings.max_length
    layers, width = architecture.layers_in(config) or 0, architecture.hidden_size(config)
    kept: int = layers * width * VALUES_PER_LAYER * base.dtype.itemsize
    return tokens * (kept + 8 * architecture.vocabulary(config))


def advice(settings: Settings) -> str:
    """What to change in a job that ran out of memory, in words; and what that saves, if the job can be planned."""
    try:
        asked = plan_training(settings)
        less = int(asked.held + 0.7 * (asked.peak - asked.held))
        found = fitting(settings, min(available_memory(usual_device()) or less, less))
    except TunesmithError:
        smallest = list(smaller(settings))[-1:]
        return "try " + flags(smallest[0], settings) if smallest else "use a smaller base"
    if found is None:
        return f"it needs about {asked.peak / 1e9:.2f} GB, and no settings reduce that much; use a smaller base"
    sizes = f"{found[1].peak / 1e9:.2f} GB rather than {asked.peak / 1e9:.2f}"
    return f"try {flags(found[0], settings)}: about {sizes} (tunesmith plan)"


def flags(settings: Settings, than: Settings) -> str:
    """The flags to add to a command so that it has these settings."""
    changed = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value != getattr(than, field.name):
            name = field.name.replace("_", "-")
            changed.append(f"--{name}" if value is True else f"--{name} {value}")
    return " ".join(changed)
