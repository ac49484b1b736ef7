"""The task classes, and `get_peft_model`: what virtual tokens must know of each task is a class attribute."""

from __future__ import annotations

from torch import nn

from .config import PeftConfig, TaskType
from .match import check_config
from .model import PeftModel

__all__ = ["PeftModel", "get_peft_model"]


class PeftModelForCausalLM(PeftModel, task=TaskType.CAUSAL_LM):
    """Text generation by a decoder."""

    labels_per_token = True


class PeftModelForSeq2SeqLM(PeftModel, task=TaskType.SEQ_2_SEQ_LM):
    """Text generation by an encoder and a decoder."""


class PeftModelForSequenceClassification(PeftModel, task=TaskType.SEQ_CLS):
    """One label per sequence; the head is trained as a private copy."""

    classifies = True


class PeftModelForTokenClassification(PeftModel, task=TaskType.TOKEN_CLS):
    """One label per token; the head is trained as a private copy."""

    labels_per_token = True


class PeftModelForQuestionAnswering(PeftModel, task=TaskType.QUESTION_ANS):
    """Answer spans; the head is trained as a private copy."""


class PeftModelForFeatureExtraction(PeftModel, task=TaskType.FEATURE_EXTRACTION):
    """Hidden states of a base without a head."""


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    autocast_adapter_dtype: bool = True,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """A handle on `model` with one new adapter; call it again on the same base for another, independent handle.

    Raises:
        ConfigError, TargetError: the configuration does not fit the model; the model is then as it was.
    """
    check_config(peft_config)
    return PeftModel.for_task(peft_config.task_type)(
        model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage
    )
