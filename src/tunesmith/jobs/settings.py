"""The settings of a training job. Each is a key of recipes, a flag of `tunesmith train` and an environment variable."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from ..config import PeftConfig, TaskType
from ..errors import ConfigError, did_you_mean
from ..train.named_optimizers import check_optimizer
from . import processes

DTYPES = ("auto", "float32", "bfloat16", "float16")
EVAL_STRATEGIES = ("epoch", "steps", "no")
REPORTERS = ("tensorboard", "wandb")
SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup")


def setting(default: Any, help: str, *names: str, shown: bool = False) -> Any:
    """A field with its help; `names` are synonyms, `shown` puts it into the short help of `train`."""
    metadata = {"help": help, "names": names, "shown": shown}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def method_names() -> list[str]:
    """Every method that needs nothing but texts, as the command line spells it: `lora`, `prompt-tuning`, ..."""
    from ..registry import all_methods

    usable = {name: method for name, method in all_methods().items() if not getattr(method.adapter, "by_task", False)}
    return [name.lower().replace("_", "-") for name in usable]


@dataclass
class Settings:
    """A job's settings under Hugging Face's names; those of the method are checked, too."""

    method: str = setting("prompt-tuning", "See `tunesmith methods`.", shown=True)
    data: str | None = setting(None, "csv, json, jsonl, parquet, txt or Hub name.", "dataset", shown=True)
    text_column: str | None = setting(None, "Train on this column as plain text.", shown=True)
    columns: dict[str, str] = setting(  # noqa: RUF009
        dict, "Column names, e.g. instruction=question.", shown=True
    )
    format: str | None = setting(
        None, "alpaca, messages, sharegpt, prompt-completion or text. Default: detected from the columns."
    )
    skip_bad_rows: bool = setting(False, "Skip rows that cannot be used.")
    template: str | None = setting(None, "chat, human-assistant, none, file.jinja, ...", shown=True)
    completion_only_loss: bool = setting(True, "Train on the answers only, not on the questions.")
    base: str = setting("sprout", "Base: sprout, a folder or a Hub id.", "model_name_or_path", shown=True)
    dtype: str = setting("auto", "Data type of the base: auto (bfloat16 where that is fast), float32, bfloat16 or float16.")
    load_in_4bit: bool = setting(False, "Load the base in 4 bits (QLoRA).", shown=True)
    load_in_8bit: bool = setting(False, "Load the base in 8 bits.")
    bnb_4bit_quant_type: str = setting("nf4", "4 bits: the type, nf4 or fp4.")
    bnb_4bit_use_double_quant: bool = setting(True, "4 bits: store the scales in 8 bits, too.", "use_bnb_nested_quant")
    output_dir: str = setting("adapter", "Where the adapter is written.", shown=True)
    num_virtual_tokens: int = setting(8, "Prompt methods: virtual tokens.", shown=True)
    prompt_tuning_init_text: str | None = setting(None, "Prompt tuning: text that initialises the virtual tokens.")
    lora_r: int = setting(8, "LoRA and its variants: rank.", shown=True)
    lora_alpha: int = setting(16, "LoRA: strength; the update is scaled by alpha / r.")
    lora_dropout: float = setting(0.0, "LoRA: dropout during training.")
    lora_target_modules: str | None = setting(None, "Comma-separated module names, or all-linear.", shown=True)
    options: dict[str, Any] = setting(  # noqa: RUF009
        dict, "Config fields, e.g. use_dora=true,bias=all.", "option", shown=True
    )
    num_train_epochs: float = setting(5.0, "Passes over the data.", "epochs", shown=True)
    max_steps: int = setting(-1, "Stop after this many steps; -1 trains for num_train_epochs.")
    per_device_train_batch_size: int = setting(8, "Rows per batch.", "batch_size", shown=True)
    gradient_accumulation_steps: int = setting(1, "Batches per optimiser step.")
    gradient_checkpointing: bool | None = setting(
        None, "Recompute activations to save memory. Default: where they would not fit."
    )
    learning_rate: float | None = setting(None, "Default: the method's usual one.", shown=True)
    lr_scheduler_type: str = setting("cosine", f"{', '.join(SCHEDULES)}.")
    optim: str = setting("adamw_torch_fused", "Optimiser, as transformers names it: paged_adamw_32bit, adamw_8bit, ...")
    warmup_steps: float | None = setting(None, "Warmup steps; below 1, a fraction of all steps. Default: up to 10.")
    weight_decay: float = setting(0.0, "Weight decay.")
    max_grad_norm: float = setting(1.0, "Clip gradients to this norm.")
    max_length: int = setting(256, "Truncate rows to this many tokens.", shown=True)
    held_out: float = setting(0.1, "Fraction held out for evaluation.", shown=True)
    packing: bool | None = setting(None, "Pack the texts of a batch into one row, without padding. Default: where possible.")
    logging_steps: int | None = setting(None, "Steps between records of the loss. Default: a thirtieth of all steps.")
    eval_strategy: str = setting("epoch", "When to evaluate on held-out rows: epoch, steps (every eval_steps) or no.")
    eval_steps: int = setting(100, "Steps between evaluations.")
    load_best_model_at_end: bool = setting(False, "Keep the adapter that did best on the held-out rows.")
    early_stopping_patience: int | None = setting(None, "Stop after this many evaluations without improvement.")
    report_to: str | None = setting(None, "tensorboard, wandb, or both with a comma; metrics.jsonl is always written.")
    samples: int = setting(3, "Held-out rows to answer before and after training, for report.html.")
    save_steps: int = setting(100, "Steps between checkpoints.", shown=True)
    save_total_limit: int = setting(2, "Number of checkpoints to keep.")
    seed: int = setting(0, "Random seed: held-out rows, initial values, order of rows.")

    def __post_init__(self) -> None:
        if self.method not in method_names():
            raise ConfigError(
                f'method "{self.method}" is unknown{did_you_mean(self.method, method_names())}; use {", ".join(method_names())}'
            )
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"held_out={self.held_out} must be at least 0 and below 1")
        above_zero = (
            "num_train_epochs", "per_device_train_batch_size", "max_length", "gradient_accumulation_steps", "save_steps",
            "save_total_limit", "max_grad_norm", "learning_rate", "logging_steps", "eval_steps", "early_stopping_patience",
        )  # fmt: skip
        for name in above_zero:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name}={value} must be above 0")
        for name in ("warmup_steps", "weight_decay"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ConfigError(f"{name}={value} must be at least 0")
        if self.dtype not in DTYPES:
            raise ConfigError(f'dtype "{self.dtype}" is unknown{did_you_mean(self.dtype, DTYPES)}; use {", ".join(DTYPES)}')
        if self.load_in_4bit and self.load_in_8bit:
            raise ConfigError("load_in_4bit and load_in_8bit are both set; choose one")
        if self.bnb_4bit_quant_type not in ("nf4", "fp4"):
            raise ConfigError(f'bnb_4bit_quant_type "{self.bnb_4bit_quant_type}" is unknown; use nf4 or fp4')
        check_optimizer(self.optim)
        if self.max_steps == 0 or self.max_steps < -1:
            raise ConfigError(f"max_steps={self.max_steps} must be above 0, or -1 to train for num_train_epochs")
        if self.lr_scheduler_type not in SCHEDULES:
            near = did_you_mean(self.lr_scheduler_type, SCHEDULES)
            raise ConfigError(f'lr_scheduler_type "{self.lr_scheduler_type}" is unknown{near}; use {", ".join(SCHEDULES)}')
        self._check_evaluations()
        self.peft_config("sprout")  # raises its own faults now, before anything is loaded

    @property
    def bits(self) -> int:
        """Bits of the base's linear weights; 16 stands for what its files hold."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else 16

    def _check_evaluations(self) -> None:
        if self.eval_strategy not in EVAL_STRATEGIES:
            near = did_you_mean(self.eval_strategy, EVAL_STRATEGIES)
            raise ConfigError(f'eval_strategy "{self.eval_strategy}" is unknown{near}; use {", ".join(EVAL_STRATEGIES)}')
        wanted = "early_stopping_patience" if self.early_stopping_patience else "load_best_model_at_end"
        if getattr(self, wanted) and (self.eval_strategy == "no" or not self.held_out):
            raise ConfigError(f"{wanted} needs evaluations; set held_out above 0 and eval_strategy to epoch or steps")
        if self.samples < 0:
            raise ConfigError(f"samples={self.samples} must be at least 0")
        unknown = [name for name in self.reporters if name not in REPORTERS]
        if unknown:
            raise ConfigError(f'report_to "{unknown[0]}" is unknown; use {" or ".join(REPORTERS)}')

    @property
    def reporters(self) -> list[str]:
        names = [name.strip() for name in (self.report_to or "").split(",")]
        return [name for name in names if name not in ("", "none")]

    @property
    def config_type(self) -> type[PeftConfig]:
        from ..registry import method_named

        return method_named(self.method.upper().replace("-", "_")).config

    def peft_config(self, base_name: str, steps: int = 1000) -> PeftConfig:
        """The method's configuration, made of the settings that have a field there; `steps` is the length of the run."""
        from ..methods.lora_config import LoraConfig
        from ..methods.prompt_tuning import PromptTuningConfig, PromptTuningInit

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

    @property
    def room(self) -> int:
        """Tokens of a row besides the virtual ones.

        Raises:
            ConfigError: there are none.
        """
        self.check_room()
        return self.max_length - self._virtual_tokens

    def check_room(self) -> None:
        """Check that a row has room for text.

        Raises:
            ConfigError: virtual tokens fill it.
        """
        if self.max_length - self._virtual_tokens < 2:
            raise ConfigError(f"max_length={self.max_length} leaves no room for text beside the virtual tokens; raise it")

    @property
    def _virtual_tokens(self) -> int:
        return getattr(self.peft_config("sprout"), "num_virtual_tokens", 0) or 0

    def steps(self, rows: int) -> int:
        """Optimiser steps of a run on this many rows."""
        batch = self.per_device_train_batch_size * self.gradient_accumulation_steps * processes.count()
        by_epochs = int(math.ceil(rows / batch) * self.num_train_epochs)
        return max(self.max_steps if self.max_steps > 0 else by_epochs, 1)

    def warmup(self, steps: int) -> int:
        """Warmup steps, of `steps` in all."""
        if self.warmup_steps is None:
            return min(10, max(1, steps // 10))
        return math.ceil(self.warmup_steps * steps) if self.warmup_steps < 1 else int(self.warmup_steps)
