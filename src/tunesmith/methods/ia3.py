"""IA3: trained factors on activations, a few thousand numbers per model.

    y = l * (W x + b),  l in R^out      for attention's keys and values
    y = W (l * x) + b,  l in R^in       for the second feed-forward layer

Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
https://arxiv.org/abs/2205.05638 (section 3.3).
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..bases.view import BaseView
from ..config import PeftConfig, TargetedConfig, config_class
from ..contracts import LinearAdapter
from ..registry import register

# The ecosystem's choices: (targets, those of them that scale their input), by `model_type`.
_TARGETS: dict[tuple[str, ...], tuple[tuple[str, ...], tuple[str, ...]]] = {
    ("llama", "mistral"): (("k_proj", "v_proj", "down_proj"), ("down_proj",)),
    ("gemma", "gemma2", "gemma3_text", "qwen2", "qwen3", "llama4"): (("q_proj", "v_proj", "down_proj"), ("down_proj",)),
    ("bloom",): (("query_key_value", "mlp.dense_4h_to_h"), ("mlp.dense_4h_to_h",)),
    ("gpt_neox", "falcon"): (("query_key_value", "dense_4h_to_h"), ("dense_4h_to_h",)),
    ("gpt2", "gpt_bigcode"): (("c_attn", "mlp.c_proj"), ("mlp.c_proj",)),
    ("opt",): (("q_proj", "k_proj", "fc2"), ("fc2",)),
    ("bart", "phi"): (("q_proj", "v_proj", "fc2"), ("fc2",)),
    ("t5",): (("k", "v", "wo"), ("wo",)),
    ("mt5",): (("k", "v", "wi_1"), ()),
    ("bert", "roberta"): (("key", "value", "output.dense"), ("output.dense",)),
}


@config_class
class IA3Config(TargetedConfig):
    """Configuration of IA3.

    Args:
        feedforward_modules: which targets scale their input rather than their output; None takes the architecture's
            usual ones when `target_modules` is None, too, else none.
        init_ia3_weights: start from factors of one (no change) rather than from random ones.
    """

    feedforward_modules: list[str] | set[str] | str | None = None
    init_ia3_weights: bool = True

    method: ClassVar[str] = "IA3"
    ours_alone: ClassVar[tuple[str, ...]] = ("layers_to_transform", "layers_pattern")

    def __post_init__(self) -> None:
        if isinstance(self.feedforward_modules, (list, tuple)):
            self.feedforward_modules = set(self.feedforward_modules)
        super().__post_init__()

    def resolve_targets(self, model_type: str | None) -> None:
        if self.target_modules is None:
            for types, (targets, feedforward) in _TARGETS.items():
                if model_type in types:
                    self.target_modules, self.feedforward_modules = set(targets), set(feedforward)
        super().resolve_targets(model_type)

    def settings(self, path: str) -> dict[str, Any]:
        wanted = self.feedforward_modules or ()
        if isinstance(wanted, str):
            return {"scales_input": re.fullmatch(wanted, path) is not None}
        return {"scales_input": any(path == name or path.endswith(f".{name}") for name in wanted)}


@register(IA3Config)
class IA3(LinearAdapter):
    """One module's factors: `(1, in)` on the input or `(out, 1)` on the output."""

    @classmethod
    def fault(cls, base: BaseView, config: PeftConfig, settings: dict[str, Any]) -> str | None:
        if base.weight().dim() != 2 or base.tokens_in:
            return "IA3 scales linear modules only; leave it out of target_modules"
        return None

    def __init__(self, base: BaseView, config: IA3Config, settings: dict[str, Any]) -> None:
        super().__init__(base, config, settings)
        out, inner = base.weight().shape
        self.scales_input: bool = settings["scales_input"]
        self.starts_at_one = config.init_ia3_weights
        self.ia3_l = nn.Parameter(torch.empty((1, inner) if self.scales_input else (out, 1)))

    def reset_parameters(self, base: BaseView) -> None:
        if self.starts_at_one:
            nn.init.ones_(self.ia3_l)
        else:
            nn.init.normal_(self.ia3_l)

    def forward(self, x: Tensor, base: BaseView, *args: Any, **kwargs: Any) -> Tensor:
        factors = self.ia3_l.flatten()
        if self.scales_input:
            return base(x * factors.to(x.dtype), *args, **kwargs)
        y = base(x, *args, **kwargs)
        return y * factors.to(y.dtype)

    def merge(self, weight: Tensor, bias: Tensor | None, base: BaseView) -> tuple[Tensor, Tensor | None]:
        factors = self.ia3_l.to(weight.dtype)  # (1, in) or (out, 1)
        scaled = None if bias is None or self.scales_input else bias * factors.flatten()
        return weight * factors, bias if scaled is None else scaled
