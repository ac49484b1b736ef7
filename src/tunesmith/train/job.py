"""One training job: a text file to an adapter, measured on rows it has not seen."""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from torch import nn

from ..config import PeftConfig, TaskType
from ..data.packing import PackedCollator, packing_fault
from ..data.text import PadRight, mean_loss, pad_id_of, split, tokenize
from ..errors import ConfigError, DataError, did_you_mean
from ..methods.lora_config import LoraConfig
from ..methods.prompt_tuning import PromptTuningConfig, PromptTuningInit
from ..registry import all_methods, method_named
from ..tasks import PeftModel, get_peft_model

if TYPE_CHECKING:
    from .trainer import Trainer


def method_names() -> list[str]:
    """Every method that needs nothing but texts, as the command line spells it: `lora`, `prompt-tuning`, ..."""
    usable = {name: method for name, method in all_methods().items() if not getattr(method.adapter, "by_task", False)}
    return [name.lower().replace("_", "-") for name in usable]


@dataclass
class Settings:
    """What a job can be told; every name is a flag of `tunesmith train`, under the ecosystem's names.

    Args:
        num_virtual_tokens, prompt_tuning_init_text: for methods with virtual tokens; a text is where prompt tuning starts.
        lora_r, lora_alpha, lora_dropout: for LoRA and its variants.
        lora_target_modules: for methods that act on chosen modules.
        options: further fields of the method's configuration, which win over the above.
        learning_rate: None takes the method's usual one.
        held_out: share of the rows kept for evaluation.
        max_length: longer rows are cut to so many tokens, virtual ones included.
        packing: put the texts of a batch into one row, without padding. None does so where the base and the method can, and
            elsewhere pads batches of rows of like lengths; False pads batches of any rows.
    """

    method: str = "prompt-tuning"
    num_virtual_tokens: int = 8
    prompt_tuning_init_text: str | None = None
    lora_r: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    lora_target_modules: str | None = None
    num_train_epochs: float = 5
    per_device_train_batch_size: int = 8
    learning_rate: float | None = None
    max_length: int = 256
    held_out: float = 0.1
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    packing: bool | None = None

    def __post_init__(self) -> None:
        if self.method not in method_names():
            raise ConfigError(
                f'method "{self.method}" is unknown{did_you_mean(self.method, method_names())}; use {", ".join(method_names())}'
            )
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"held_out={self.held_out} must be at least 0 and below 1")
        for name in ("num_train_epochs", "per_device_train_batch_size", "max_length"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name}={getattr(self, name)} must be above 0")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"learning_rate={self.learning_rate} must be above 0")
        self.peft_config("sprout")  # its own faults show now, before anything is loaded

    @property
    def config_type(self) -> type[PeftConfig]:
        return method_named(self.method.upper().replace("-", "_")).config

    def peft_config(self, base_name: str, steps: int = 1000) -> PeftConfig:
        """The method's configuration, of the settings that have a field there; `steps` is the length of the training."""
        targets: Any = self.lora_target_modules
        if targets and targets != "all-linear":
            targets = [name.strip() for name in targets.split(",")]
        text = self.prompt_tuning_init_text
        values = {
            "target_modules": targets,
            "num_virtual_tokens": self.num_virtual_tokens,
            "adapter_len": self.num_virtual_tokens,
            "adapter_layers": 2,
            "total_step": steps,
        }
        if issubclass(self.config_type, LoraConfig):
            values |= {"r": self.lora_r, "lora_alpha": self.lora_alpha, "lora_dropout": self.lora_dropout}
        if issubclass(self.config_type, PromptTuningConfig):
            values["prompt_tuning_init"] = PromptTuningInit.TEXT if text else PromptTuningInit.SAMPLE_VOCAB
            values |= {"prompt_tuning_init_text": text, "tokenizer_name_or_path": base_name}
        fields = {known.name for known in dataclasses.fields(self.config_type) if known.init}
        values = {name: value for name, value in values.items() if name in fields}
        return self.config_type(task_type=TaskType.CAUSAL_LM, **{**values, **self.options})

    @property
    def rate(self) -> float:
        return self.learning_rate or self.config_type.usual_learning_rate


@dataclass
class Result:
    """A trained handle and what was measured on the way; losses are nats per token."""

    handle: PeftModel
    held_out: list[dict[str, list[int]]]
    held_out_before: float | None
    held_out_after: float | None
    losses: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0

    def sentence(self) -> str:
        """The outcome in one line, as perplexities."""
        speed = f"{self.seconds:.0f} s, {self.tokens / max(self.seconds, 1e-9):,.0f} tokens/s"
        if self.held_out_before is None or self.held_out_after is None:
            return speed
        before, after = math.exp(self.held_out_before), math.exp(self.held_out_after)
        return f"held-out perplexity {before:.1f} -> {after:.1f} on {len(self.held_out)} rows ({speed})"


def train(base: nn.Module, tokenizer: Any, texts: Sequence[str], settings: Settings, title: str, console: Console) -> Result:
    """Train one adapter on `texts`; the base is not changed, so any number of jobs share it.

    Raises:
        DataError: too few rows.
        ConfigError, TargetError: the method does not fit the base.
    """
    import torch
    from transformers import PrinterCallback, TrainingArguments

    from .progress import ShowProgress

    train_texts, held_out_texts = split(texts, settings.held_out, settings.seed)
    if not train_texts:
        raise DataError(f"{len(texts)} row(s) leave nothing to train on; add rows or set --held-out 0")
    room = settings.max_length - getattr(settings.peft_config("sprout"), "num_virtual_tokens", 0)
    if room < 2:
        raise ConfigError(f"max_length={settings.max_length} leaves no room for text beside the virtual tokens; raise it")
    data, held_out = tokenize(train_texts, tokenizer, room), tokenize(held_out_texts, tokenizer, room)
    if data.cut or held_out.cut:
        console.print(f"{title}: {data.cut + held_out.cut} of {len(texts)} rows cut to {room} tokens (--max-length)")

    torch.manual_seed(settings.seed)
    name = getattr(base, "name_or_path", "")
    steps = int(math.ceil(len(data.examples) / settings.per_device_train_batch_size) * settings.num_train_epochs)
    handle = get_peft_model(base, settings.peft_config(name, max(steps, 1)))
    pad_id = pad_id_of(tokenizer)
    trainer_type, collator = batching(handle, settings.packing, pad_id)
    before = mean_loss(base, held_out.examples, pad_id) if held_out.examples else None
    progress = ShowProgress(title, console)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            save_strategy="no",
            num_train_epochs=settings.num_train_epochs,
            per_device_train_batch_size=settings.per_device_train_batch_size,
            learning_rate=settings.rate,
            lr_scheduler_type="cosine",
            warmup_steps=min(10, max(1, steps // 10)),
            logging_steps=max(1, steps // 30),
            seed=settings.seed,
            data_seed=settings.seed,
            report_to=[],
            disable_tqdm=True,
        )
        trainer = trainer_type(
            model=handle, args=arguments, train_dataset=data.examples, data_collator=collator, callbacks=[progress]
        )
        trainer.remove_callback(PrinterCallback)
        started = time.monotonic()
        trainer.train()
        seconds = time.monotonic() - started
    handle.eval()
    after = mean_loss(handle, held_out.examples, pad_id) if held_out.examples else None
    tokens = int(data.tokens * settings.num_train_epochs)
    return Result(handle, held_out.examples, before, after, progress.losses, seconds, tokens)


def batching(handle: PeftModel, packing: bool | None, pad_id: int) -> tuple[type[Trainer], PackedCollator | PadRight]:
    """What trainer and collator a job takes; `packing` as in `Settings`.

    Raises:
        ConfigError: texts are to be packed, but cannot be kept apart.
    """
    from .buckets import BucketTrainer
    from .trainer import Trainer

    cannot = packing_fault(handle)
    if packing and cannot:
        raise ConfigError(f"texts cannot be packed here: {cannot}; leave --packing out")
    if cannot is None and packing is not False:
        return Trainer, PackedCollator()
    return BucketTrainer if packing is None else Trainer, PadRight(pad_id)


def save(result: Result, tokenizer: Any, folder: Path) -> int:
    """Write the adapter and its tokenizer; returns the size of the adapter's tensors in bytes."""
    result.handle.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return (folder / "adapter_model.safetensors").stat().st_size
