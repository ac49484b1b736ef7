"""LoRA on an embedding, acting in every module that holds the embedding's weight (`ensure_weight_tying`).

    E' = E + s (B A)^T;   an output head with W = E follows as W' = W + s A^T B^T

The head has no tensors of its own: its factors are the embedding's, transposed. So both change as one, and merging leaves
one weight.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..adapter import LinearAdapter
from ..bases.view import BaseView
from ..registry import register_part
from .lora import Lora
from .lora_config import LoraConfig, LoraSettings


@register_part("_tied")
class TiedLora(Lora):
    """The factors of the embedding that it follows; transposed, unless it is on an embedding itself."""

    @classmethod
    def fault(cls, base: BaseView, config: LoraConfig, settings: LoraSettings) -> str | None:
        if config.use_dora or config.lora_bias:
            what = "use_dora" if config.use_dora else "lora_bias"
            return f"{what} is different for an embedding and for an output head, so they cannot stay tied; leave one out"
        return None

    def __init__(self, base: BaseView, config: LoraConfig, settings: LoraSettings) -> None:
        LinearAdapter.__init__(self, base, config, settings)
        self.transposed = not base.tokens_in
        self.scale = settings.scale
        self.dropout = nn.Dropout(config.lora_dropout)
        self.lora_B_bias = None

    @property
    def lora_A(self) -> Tensor:  # type: ignore[override]
        owner: Any = self.owner
        factor: Tensor = owner.lora_B.T if self.transposed else owner.lora_A
        return factor

    @property
    def lora_B(self) -> Tensor:  # type: ignore[override]
        owner: Any = self.owner
        factor: Tensor = owner.lora_A.T if self.transposed else owner.lora_B
        return factor

    def reset_parameters(self, base: BaseView) -> None:
        """There are none."""

    def in_file(self, beside: bool) -> dict[str, Tensor]:
        return {}

    def second_names(self) -> list[str]:
        return ["lora_A.weight", "lora_B.weight"] if self.transposed else []
