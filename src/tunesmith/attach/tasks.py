"""Which task a configuration is for, and whether a model can do it."""

from __future__ import annotations

import copy
from typing import Any

from ..bases import architecture
from ..config import PeftConfig, PromptConfig, TaskType
from ..errors import ConfigError

_HEADS = {
    TaskType.SEQ_CLS: "AutoModelForSequenceClassification",
    TaskType.TOKEN_CLS: "AutoModelForTokenClassification",
    TaskType.QUESTION_ANS: "AutoModelForQuestionAnswering",
}


def check_config(config: Any) -> None:
    if not isinstance(config, PeftConfig):
        raise ConfigError(f"peft_config must be a configuration such as LoraConfig(...), got {type(config).__name__}")


def fitting_task(model: Any, config: PeftConfig) -> TaskType | str | None:
    """The task of a loaded configuration if the model can do it, else the one that the model is for (None: any)."""
    for task in (config.task_type, TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM, None):
        tried = copy.copy(config)
        tried.task_type = task
        try:
            check_task(model, tried)
        except ConfigError:
            continue
        return tried.task_type
    return config.task_type


def check_task(model: Any, config: PeftConfig) -> None:
    """Refuse a task that the model cannot do, before anything is built."""
    task = config.task_type
    assert task is None or isinstance(task, TaskType), "a config turns a name into a TaskType"
    name = type(model).__name__
    base = architecture.config_of(model)
    encoder_decoder = architecture.is_encoder_decoder(base)
    if task == TaskType.SEQ_2_SEQ_LM and architecture.is_decoder_only(base):
        raise ConfigError(f"task_type=SEQ_2_SEQ_LM needs an encoder-decoder, {name} has none; use CAUSAL_LM")
    if task == TaskType.CAUSAL_LM and encoder_decoder and hasattr(model, "get_encoder"):
        raise ConfigError(f"task_type=CAUSAL_LM needs a decoder-only model, {name} has an encoder; use SEQ_2_SEQ_LM")
    if task in (TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM) and base is not None and not hasattr(model, "generate"):
        raise ConfigError(f"task_type={task.value} needs a model that generates, {name} does not; load it with its LM head")
    if task in _HEADS and architecture.output_head(model) is not None:
        raise ConfigError(
            f"task_type={task.value} needs a model with a task head, {name} has a language model's; load it with {_HEADS[task]}"
        )
    if isinstance(config, PromptConfig):
        if task is None:
            raise ConfigError(
                "virtual tokens need a task_type, which says how labels are aligned, e.g. task_type=TaskType.CAUSAL_LM"
            )
        if not hasattr(model, "get_input_embeddings"):
            raise ConfigError(f"virtual tokens need a model with input embeddings, {name} has none")
