"""What a training job can be told. Each field is a key of recipes, a flag of `tunesmith train` and an environment variable."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from ..config import PeftConfig, TaskType
from ..errors import ConfigError, did_you_mean
from ..train.named_optimizers import check_optimizer

DTYPES = ("auto", "float32", "bfloat16", "float16")
EVAL_STRATEGIES = ("epoch", "steps", "no")
REPORTERS = ("tensorboard", "wandb")
SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup")


def setting(default: Any, help: str, *names: str, shown: bool = False) -> Any:
    """A field with its help; `names` are further spellings of it, `shown` puts it into the short help of `train`."""
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
    """A job's settings under the ecosystem's names; those of the method are checked when made."""

    method: str = setting("prompt-tuning", "See `tunesmith methods`.", shown=True)
    data: str | None = setting(None, "csv, json, jsonl, parquet, txt or hub name.", "dataset", shown=True)
    text_column: str | None = setting(None, "Train on this column as plain text.", shown=True)
    columns: dict[str, str] = setting(  # noqa: RUF009
        dict, "Your names, e.g. instruction=question.", shown=True
    )
    format: str | None = setting(None, "alpaca, messages, sharegpt, prompt-completion or text; default: told by the columns.")
    skip_bad_rows: bool = setting(False, "Train on the good rows where some cannot be used.")
    template: str | None = setting(None, "chat, human-assistant, none, file.jinja, ...", shown=True)
    completion_only_loss: bool = setting(True, "Train the answers alone, not the questions.")
    base: str = setting("sprout", "Base: sprout, a folder or a hub id.", "model_name_or_path", shown=True)
    dtype: str = setting("auto", "What the base computes in: auto (bfloat16 where that is fast), float32, bfloat16 or float16.")
    load_in_4bit: bool = setting(False, "Store the base in 4 bits (QLoRA).", shown=True)
    load_in_8bit: bool = setting(False, "Store the base in 8 bits.")
    bnb_4bit_quant_type: str = setting("nf4", "4 bits: nf4 or fp4.")
    bnb_4bit_use_double_quant: bool = setting(True, "4 bits: store the scales in 8 bits.", "use_bnb_nested_quant")
    output_dir: str = setting("adapter", "Where the adapter is written.", shown=True)
    num_virtual_tokens: int = setting(8, "Prompt methods: how many virtual tokens.", shown=True)
    prompt_tuning_init_text: str | None = setting(None, "Prompt tuning: a text to start from.")
    lora_r: int = setting(8, "LoRA and its kin: rank.", shown=True)
    lora_alpha: int = setting(16, "LoRA: strength (scale is alpha / r).")
    lora_dropout: float = setting(0.0, "LoRA: dropout while training.")
    lora_target_modules: str | None = setting(None, "Comma-separated names or all-linear.", shown=True)
    options: dict[str, Any] = setting(  # noqa: RUF009
        dict, "Config fields, e.g. use_dora=true,bias=all.", "option", shown=True
    )
    num_train_epochs: float = setting(5.0, "Passes over the data.", "epochs", shown=True)
    max_steps: int = setting(-1, "Stop after so many steps; -1 goes by the epochs.")
    per_device_train_batch_size: int = setting(8, "Rows per step.", "batch_size", shown=True)
    gradient_accumulation_steps: int = setting(1, "Batches that make one step.")
    gradient_checkpointing: bool | None = setting(
        None, "Compute activations twice to save memory. Default: where memory needs it."
    )
    learning_rate: float | None = setting(None, "Default: the method's usual one.", shown=True)
    lr_scheduler_type: str = setting("cosine", f"{', '.join(SCHEDULES)}.")
    optim: str = setting("adamw_torch_fused", "Optimiser, by transformers' names: paged_adamw_32bit, adamw_8bit, ...")
    warmup_steps: float | None = setting(None, "Steps of rising learning rate; below 1, a share of all. Default: up to 10.")
    weight_decay: float = setting(0.0, "Pull of the weights towards 0.")
    max_grad_norm: float = setting(1.0, "Longer gradients are cut to this length.")
    max_length: int = setting(256, "Cut longer rows to so many tokens.", shown=True)
    held_out: float = setting(0.1, "Share of the rows kept for evaluation.", shown=True)
    packing: bool | None = setting(None, "Texts of a batch in one row, unpadded. Default: where possible.")
    logging_steps: int | None = setting(None, "Steps between records of the loss; default: a thirtieth of all.")
    eval_strategy: str = setting("epoch", "When held-out rows are measured: epoch, steps (every eval_steps) or no.")
    eval_steps: int = setting(100, "Steps between measurements.")
    load_best_model_at_end: bool = setting(False, "End with the adapter that was best on the held-out rows.")
    early_stopping_patience: int | None = setting(None, "End after so many measurements that were no better than the best.")
    report_to: str | None = setting(None, "tensorboard or wandb, or both by a comma; metrics.jsonl is always written.")
    samples: int = setting(3, "Held-out rows answered before and after, for report.html.")
    save_steps: int = setting(100, "Steps between checkpoints.", shown=True)
    save_total_limit: int = setting(2, "How many checkpoints are kept.")
    seed: int = setting(0, "Decides the held-out rows, start values and order of rows.")

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
            raise ConfigError("load_in_4bit and load_in_8bit are both set; a base is stored in one of them")
        if self.bnb_4bit_quant_type not in ("nf4", "fp4"):
            raise ConfigError(f'bnb_4bit_quant_type "{self.bnb_4bit_quant_type}" is unknown; use nf4 or fp4')
        check_optimizer(self.optim)
        if self.max_steps == 0 or self.max_steps < -1:
            raise ConfigError(f"max_steps={self.max_steps} must be above 0, or -1 to go by the epochs")
        if self.lr_scheduler_type not in SCHEDULES:
            near = did_you_mean(self.lr_scheduler_type, SCHEDULES)
            raise ConfigError(f'lr_scheduler_type "{self.lr_scheduler_type}" is unknown{near}; use {", ".join(SCHEDULES)}')
        self._check_measurements()
        self.peft_config("sprout")  # its own faults show now, before anything is loaded

    @property
    def bits(self) -> int:
        """In how many bits the base's linear maps are stored; 16 stands for what its files hold."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else 16

    def _check_measurements(self) -> None:
        if self.eval_strategy not in EVAL_STRATEGIES:
            near = did_you_mean(self.eval_strategy, EVAL_STRATEGIES)
            raise ConfigError(f'eval_strategy "{self.eval_strategy}" is unknown{near}; use {", ".join(EVAL_STRATEGIES)}')
        wanted = "early_stopping_patience" if self.early_stopping_patience else "load_best_model_at_end"
        if getattr(self, wanted) and (self.eval_strategy == "no" or not self.held_out):
            raise ConfigError(f"{wanted} needs measurements; set held_out above 0 and eval_strategy to epoch or steps")
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
        """The method's configuration, of the settings that have a field there; `steps` is the length of the training."""
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
        """Tokens of a row beside the virtual ones.

        Raises:
            ConfigError: there are none.
        """
        room = self.max_length - (getattr(self.peft_config("sprout"), "num_virtual_tokens", 0) or 0)
        if room < 2:
            raise ConfigError(f"max_length={self.max_length} leaves no room for text beside the virtual tokens; raise it")
        return room

    def steps(self, rows: int) -> int:
        """Optimiser steps of a training on so many rows."""
        batch = self.per_device_train_batch_size * self.gradient_accumulation_steps
        by_epochs = int(math.ceil(rows / batch) * self.num_train_epochs)
        return max(self.max_steps if self.max_steps > 0 else by_epochs, 1)

    def warmup(self, steps: int) -> int:
        """Steps of rising learning rate, of `steps` in all."""
        if self.warmup_steps is None:
            return min(10, max(1, steps // 10))
        return math.ceil(self.warmup_steps * steps) if self.warmup_steps < 1 else int(self.warmup_steps)
