"""Tunesmith: one frozen base model, any number of small adapters.

Names are imported when first used: `import tunesmith` is quick and pulls in no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

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
    "config": ["PeftConfig", "PeftType", "PromptConfig", "TargetedConfig", "TaskType", "config_class"],
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
    "jobs.fit": ["plan_training"],
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


if TYPE_CHECKING:
    from .assets import resolve as resolve
    from .config import PeftConfig as PeftConfig
    from .config import PeftType as PeftType
    from .config import TaskType as TaskType
    from .methods.lora_config import LoraConfig as LoraConfig
    from .methods.prompt_tuning import PromptTuningConfig as PromptTuningConfig
    from .methods.prompt_tuning import PromptTuningInit as PromptTuningInit
    from .model import PeftModel as PeftModel
    from .model import get_peft_model as get_peft_model
