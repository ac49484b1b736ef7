"""BitFit: the biases alone are trained, as private copies: about a thousandth of the parameters.

    y = W x + b'

Ben Zaken, Goldberg, Ravfogel 2022, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
Language-models", https://arxiv.org/abs/2106.10199 (section 3). The file format is Tunesmith's own, see docs/formats.md.
"""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from ..adapter import ParameterAdapter
from ..config import Settings, TargetedConfig, config_class
from ..registry import register


@config_class
class BitFitConfig(TargetedConfig):
    """Configuration of BitFit; without `target_modules` every bias of the base is trained, norms' included."""

    method: ClassVar[str] = "BITFIT"
    usual_learning_rate: ClassVar[float] = 0.005

    def resolve_targets(self, model_type: str | None) -> None:
        """No architecture has a usual list: `BitFit.usual_targets` finds the biases on the base itself."""


@register(BitFitConfig)
class BitFit(ParameterAdapter):
    """A private copy of one module's bias."""

    @classmethod
    def fault(cls, module: nn.Module, config: BitFitConfig, settings: Settings) -> str | None:
        return None if _has_bias(module) else f"it is a {type(module).__name__} without a bias; leave it out of target_modules"

    @classmethod
    def usual_targets(cls, modules: dict[str, nn.Module]) -> set[str]:
        return {path for path, module in modules.items() if path and _has_bias(module)}

    def __init__(self, module: nn.Module, config: BitFitConfig, settings: Settings) -> None:
        super().__init__(module, ["bias"])


def _has_bias(module: nn.Module) -> bool:
    return module._parameters.get("bias") is not None
