"""Tunesmith: one frozen base model, any number of small adapters.

Names are imported when first used: `import tunesmith` is quick and pulls in no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import compat as compat

__version__ = "0.1.0"

_PLACES = {
    "assets": ["resolve"],
    "auto": [
        "AutoPeftModel", "AutoPeftModelForCausalLM", "AutoPeftModelForFeatureExtraction",
        "AutoPeftModelForQuestionAnswering", "AutoPeftModelForSeq2SeqLM", "AutoPeftModelForSequenceClassification",
        "AutoPeftModelForTokenClassification", "load_base", "load_tokenizer",
    ],
    "bases.prepare": ["prepare_model_for_kbit_training"],
    "bases.view": ["BaseView"],
    "config": ["PeftConfig", "PeftType", "PromptConfig", "Settings", "TargetedConfig", "TaskType", "config_class"],
    "adapter": ["LinearAdapter", "PromptAdapter", "SublayerAdapter"],
    "data.packing": ["LengthBuckets", "PackedCollator"],
    "errors": [
        "AdapterFileError", "AdapterNameError", "ConfigError", "DataError", "TargetError", "TunesmithError", "UsageError",
    ],
    "handle.packing": ["can_pack", "packing_fault"],
    "methods.adalora": ["AdaLoraConfig"],
    "methods.adaption_prompt": ["AdaptionPromptConfig"],
    "methods.bitfit": ["BitFitConfig"],
    "methods.boft": ["BOFTConfig"],
    "methods.bottleneck": ["BottleneckConfig"],
    "methods.hra": ["HRAConfig"],
    "methods.ia3": ["IA3Config"],
    "methods.ln_tuning": ["LNTuningConfig"],
    "methods.loha": ["LoHaConfig"],
    "methods.lokr": ["LoKrConfig"],
    "methods.lora_config": ["EvaConfig", "LoftQConfig", "LoraConfig"],
    "methods.multitask_prompt_tuning": ["MultitaskPromptTuningConfig", "MultitaskPromptTuningInit"],
    "methods.oft": ["OFTConfig"],
    "methods.p_tuning": ["PromptEncoderConfig", "PromptEncoderReparameterizationType"],
    "methods.prefix_tuning": ["PrefixTuningConfig"],
    "methods.prompt_tuning": ["PromptTuningConfig", "PromptTuningInit"],
    "methods.trainable_tokens": ["TrainableTokensConfig"],
    "methods.vera": ["VeraConfig"],
    "jobs.sizing": ["plan_training"],
    "registry": ["register"],
    "handle.status": ["TunerLayerStatus", "TunerModelStatus", "get_layer_status", "get_model_status"],
    "model": [
        "PeftModel", "PeftModelForCausalLM", "PeftModelForFeatureExtraction", "PeftModelForQuestionAnswering",
        "PeftModelForSeq2SeqLM", "PeftModelForSequenceClassification", "PeftModelForTokenClassification", "get_peft_model",
    ],
    "train.eva": ["get_eva_state_dict", "initialize_lora_eva_weights"],
    "train.optimizers": ["LoraFAOptimizer", "create_lorafa_optimizer", "create_loraplus_optimizer"],
    "train.trainer": ["AdapterTrainerMixin", "Trainer"],
}  # fmt: skip
_HOME = {name: module for module, names in _PLACES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tunesmith' has no attribute '{name}'")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


if TYPE_CHECKING:  # the same names once more, for editors and type checkers; tests/test_public_names.py compares
    from .adapter import LinearAdapter as LinearAdapter
    from .adapter import PromptAdapter as PromptAdapter
    from .adapter import SublayerAdapter as SublayerAdapter
    from .assets import resolve as resolve
    from .auto import AutoPeftModel as AutoPeftModel
    from .auto import AutoPeftModelForCausalLM as AutoPeftModelForCausalLM
    from .auto import AutoPeftModelForFeatureExtraction as AutoPeftModelForFeatureExtraction
    from .auto import AutoPeftModelForQuestionAnswering as AutoPeftModelForQuestionAnswering
    from .auto import AutoPeftModelForSeq2SeqLM as AutoPeftModelForSeq2SeqLM
    from .auto import AutoPeftModelForSequenceClassification as AutoPeftModelForSequenceClassification
    from .auto import AutoPeftModelForTokenClassification as AutoPeftModelForTokenClassification
    from .auto import load_base as load_base
    from .auto import load_tokenizer as load_tokenizer
    from .bases.prepare import prepare_model_for_kbit_training as prepare_model_for_kbit_training
    from .bases.view import BaseView as BaseView
    from .config import PeftConfig as PeftConfig
    from .config import PeftType as PeftType
    from .config import PromptConfig as PromptConfig
    from .config import Settings as Settings
    from .config import TargetedConfig as TargetedConfig
    from .config import TaskType as TaskType
    from .config import config_class as config_class
    from .data.packing import LengthBuckets as LengthBuckets
    from .data.packing import PackedCollator as PackedCollator
    from .errors import AdapterFileError as AdapterFileError
    from .errors import AdapterNameError as AdapterNameError
    from .errors import ConfigError as ConfigError
    from .errors import DataError as DataError
    from .errors import TargetError as TargetError
    from .errors import TunesmithError as TunesmithError
    from .errors import UsageError as UsageError
    from .handle.packing import can_pack as can_pack
    from .handle.packing import packing_fault as packing_fault
    from .handle.status import TunerLayerStatus as TunerLayerStatus
    from .handle.status import TunerModelStatus as TunerModelStatus
    from .handle.status import get_layer_status as get_layer_status
    from .handle.status import get_model_status as get_model_status
    from .jobs.sizing import plan_training as plan_training
    from .methods.adalora import AdaLoraConfig as AdaLoraConfig
    from .methods.adaption_prompt import AdaptionPromptConfig as AdaptionPromptConfig
    from .methods.bitfit import BitFitConfig as BitFitConfig
    from .methods.boft import BOFTConfig as BOFTConfig
    from .methods.bottleneck import BottleneckConfig as BottleneckConfig
    from .methods.hra import HRAConfig as HRAConfig
    from .methods.ia3 import IA3Config as IA3Config
    from .methods.ln_tuning import LNTuningConfig as LNTuningConfig
    from .methods.loha import LoHaConfig as LoHaConfig
    from .methods.lokr import LoKrConfig as LoKrConfig
    from .methods.lora_config import EvaConfig as EvaConfig
    from .methods.lora_config import LoftQConfig as LoftQConfig
    from .methods.lora_config import LoraConfig as LoraConfig
    from .methods.multitask_prompt_tuning import MultitaskPromptTuningConfig as MultitaskPromptTuningConfig
    from .methods.multitask_prompt_tuning import MultitaskPromptTuningInit as MultitaskPromptTuningInit
    from .methods.oft import OFTConfig as OFTConfig
    from .methods.p_tuning import PromptEncoderConfig as PromptEncoderConfig
    from .methods.p_tuning import PromptEncoderReparameterizationType as PromptEncoderReparameterizationType
    from .methods.prefix_tuning import PrefixTuningConfig as PrefixTuningConfig
    from .methods.prompt_tuning import PromptTuningConfig as PromptTuningConfig
    from .methods.prompt_tuning import PromptTuningInit as PromptTuningInit
    from .methods.trainable_tokens import TrainableTokensConfig as TrainableTokensConfig
    from .methods.vera import VeraConfig as VeraConfig
    from .model import PeftModel as PeftModel
    from .model import PeftModelForCausalLM as PeftModelForCausalLM
    from .model import PeftModelForFeatureExtraction as PeftModelForFeatureExtraction
    from .model import PeftModelForQuestionAnswering as PeftModelForQuestionAnswering
    from .model import PeftModelForSeq2SeqLM as PeftModelForSeq2SeqLM
    from .model import PeftModelForSequenceClassification as PeftModelForSequenceClassification
    from .model import PeftModelForTokenClassification as PeftModelForTokenClassification
    from .model import get_peft_model as get_peft_model
    from .registry import register as register
    from .train.eva import get_eva_state_dict as get_eva_state_dict
    from .train.eva import initialize_lora_eva_weights as initialize_lora_eva_weights
    from .train.optimizers import LoraFAOptimizer as LoraFAOptimizer
    from .train.optimizers import create_lorafa_optimizer as create_lorafa_optimizer
    from .train.optimizers import create_loraplus_optimizer as create_loraplus_optimizer
    from .train.trainer import AdapterTrainerMixin as AdapterTrainerMixin
    from .train.trainer import Trainer as Trainer
