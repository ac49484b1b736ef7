"""LN tuning: the norms' own scales (and shifts) are trained, as private copies; nothing else learns.

    y = norm(x) * g' + b'

Zhao et al. 2024, "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning",
https://arxiv.org/abs/2312.11420 (section 3).
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from ..adapter import ParameterAdapter
from ..bases.view import view_type
from ..config import Settings, TargetedConfig, config_class
from ..registry import register

# The ecosystem's choices by `model_type`; elsewhere every norm is taken.
_TARGETS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("llama", "mistral", "gemma"): ("input_layernorm", "post_attention_layernorm", "norm"),
    ("gemma2", "gemma3_text"): (
        "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm", "norm",
    ),
    ("bloom", "falcon"): ("input_layernorm", "post_attention_layernorm", "ln_f"),
    ("phi",): ("input_layernorm", "final_layernorm"),
    ("qwen2", "qwen3"): ("post_attention_layernorm",),
    ("t5", "mt5"): ("layer_norm", "final_layer_norm"),
    ("bart",): ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
    ("gpt2",): ("ln_1", "ln_2", "ln_f"),
    ("gptj",): ("ln_1", "ln_f"),
    ("blip-2",): ("layernorm", "LayerNorm", "final_layer_norm", "self_attn_layer_norm"),
}  # fmt: skip


@config_class
class LNTuningConfig(TargetedConfig):
    """Configuration of LN tuning; without `target_modules` the architecture's usual norms are trained."""

    method: ClassVar[str] = "LN_TUNING"
    usual_learning_rate: ClassVar[float] = 0.01
    ours_alone: ClassVar[tuple[str, ...]] = ("fan_in_fan_out", "layers_to_transform", "layers_pattern")

    def resolve_targets(self, model_type: str | None) -> None:
        for types, targets in _TARGETS.items():
            if self.target_modules is None and model_type in types:
                self.target_modules = set(targets)


@register(LNTuningConfig)
class LNTuning(ParameterAdapter):
    """Private copies of one norm's parameters."""

    @classmethod
    def fault(cls, module: nn.Module, config: LNTuningConfig, settings: Settings) -> str | None:
        kind = type(module).__name__
        if view_type(module) is not None:
            return f"it is a {kind}, not a norm; name it in modules_to_save to train it whole, or use LoRA"
        if not _own_parameters(module):
            return f"it is a {kind} without parameters of its own; name norms"
        return None

    @classmethod
    def usual_targets(cls, modules: dict[str, nn.Module]) -> set[str]:
        return {path for path, module in modules.items() if type(module).__name__.endswith("Norm") and _own_parameters(module)}

    def __init__(self, module: nn.Module, config: LNTuningConfig, settings: Settings) -> None:
        super().__init__(module, _own_parameters(module))

    def in_file(self, beside: bool) -> dict[str, Tensor]:
        return {f"ln_tuning_layers.{name}": tensor for name, tensor in super().in_file(beside).items()}


def _own_parameters(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters(recurse=False)]
