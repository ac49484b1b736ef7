"""LoRA: a trained low-rank change beside each frozen weight.

    y = W x + b + s B A dropout(x),   s = alpha / r   (rsLoRA: alpha / sqrt(r))

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", https://arxiv.org/abs/2106.09685 (section 4.1);
rsLoRA: Kalajdzievski 2023, https://arxiv.org/abs/2312.03732.
"""

from __future__ import annotations

import math
import re
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..bases.view import BaseView
from ..config import PeftConfig, TargetedConfig, config_class
from ..contracts import LinearAdapter
from ..registry import register


@config_class
class LoraConfig(TargetedConfig):
    """Configuration of LoRA.

    Args:
        r: rank of the change.
        lora_alpha: strength; the change is scaled by `lora_alpha / r`.
        lora_dropout: probability of dropping an input of the change while training.
        use_rslora: scale by `lora_alpha / sqrt(r)` instead.
        bias: "none", "lora_only" (biases of adapted modules) or "all" (every bias); trained as private copies.
        init_lora_weights: True (A Kaiming-uniform, B zero), "gaussian" (A normal with deviation 1/r, B zero) or
            False (both random: the change is not zero at first).
        rank_pattern, alpha_pattern: `{name ending or regular expression: value}` for single modules.
    """

    r: int = 8
    lora_alpha: int | float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    bias: str = "none"
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, int | float] | None = None

    method: ClassVar[str] = "LORA"
    not_supported: ClassVar[dict[str, tuple]] = {
        "use_dora": (), "lora_bias": (), "trainable_token_indices": (), "target_parameters": (), "layer_replication": (),
        "loftq_config": (), "eva_config": (), "corda_config": (), "use_qalora": (), "qalora_group_size": (16,),
        "megatron_config": (), "megatron_core": ("megatron.core",), "ensure_weight_tying": (), "alora_invocation_tokens": (),
        "arrow_config": (), "lora_ga_config": (), "runtime_config": ({"ephemeral_gpu_offload": False},),
        "use_bdlora": (), "velora_config": (), "monteclora_config": (), "kasa_config": (),
    }  # fmt: skip

    def __post_init__(self) -> None:
        self.rank_pattern = self.rank_pattern or {}
        self.alpha_pattern = self.alpha_pattern or {}
        super().__post_init__()

    def faults(self) -> list[str]:
        found = super().faults()
        ranks = {"r": self.r} | {f'rank_pattern["{k}"]': r for k, r in (self.rank_pattern or {}).items()}
        found += [f"{name}={r!r} must be a whole number of at least 1" for name, r in ranks.items() if not _is_rank(r)]
        alphas = {
            "lora_alpha": self.lora_alpha,
            **{f'alpha_pattern["{key}"]': a for key, a in (self.alpha_pattern or {}).items()},
        }
        found += [f"{name}={alpha!r} must be a finite number" for name, alpha in alphas.items() if not math.isfinite(alpha)]
        if not 0.0 <= self.lora_dropout < 1.0:
            found.append(f"lora_dropout={self.lora_dropout!r} must be at least 0 and below 1")
        if self.bias not in ("none", "all", "lora_only"):
            found.append(f'bias={self.bias!r} must be "none", "all" or "lora_only"')
        if self.init_lora_weights not in (True, False, "gaussian"):
            found.append(f'init_lora_weights={self.init_lora_weights!r} must be True, False or "gaussian"')
        return found

    def settings(self, path: str) -> dict[str, Any]:
        r = _by_pattern(self.rank_pattern, path, self.r)
        alpha = _by_pattern(self.alpha_pattern, path, self.lora_alpha)
        return {"r": r, "scale": alpha / math.sqrt(r) if self.use_rslora else alpha / r}

    def pattern_keys(self) -> dict[str, list[str]]:
        return {"rank_pattern": list(self.rank_pattern or ()), "alpha_pattern": list(self.alpha_pattern or ())}


@register(LoraConfig)
class Lora(LinearAdapter):
    """LoRA's A and B for one module; shapes by the module's view, for a linear map A `(r, in)`, B `(out, r)`."""

    @classmethod
    def fault(cls, base: BaseView, config: PeftConfig, settings: dict[str, Any]) -> str | None:
        groups = getattr(base.module, "groups", 1)
        return f"r={settings['r']} is not a multiple of its {groups} groups" if settings["r"] % groups else None

    def __init__(self, base: BaseView, config: LoraConfig, settings: dict[str, Any]) -> None:
        super().__init__(base, config, settings)
        a_shape, b_shape = base.low_rank_shapes(settings["r"])
        self.scale: float = settings["scale"]
        self.init = config.init_lora_weights
        self.lora_A = nn.Parameter(torch.empty(a_shape))
        self.lora_B = nn.Parameter(torch.empty(b_shape))
        self.dropout = nn.Dropout(config.lora_dropout)

    def reset_parameters(self, base: BaseView) -> None:
        """Start from no change: one factor is zero (for embeddings A, else B), unless `init_lora_weights=False`."""
        random, zero = (self.lora_B, self.lora_A) if base.tokens_in else (self.lora_A, self.lora_B)
        if base.tokens_in:
            nn.init.normal_(random)
        elif self.init == "gaussian":
            nn.init.normal_(random, std=1 / random.shape[0])
        else:
            nn.init.kaiming_uniform_(random, a=math.sqrt(5))
        nn.init.zeros_(zero)
        if self.init is False:
            nn.init.kaiming_uniform_(zero, a=math.sqrt(5))

    def forward(self, x: Tensor, base: BaseView, *args: Any, **kwargs: Any) -> Tensor:
        y = base(x, *args, **kwargs)
        inputs = x if base.tokens_in else self.dropout(x.to(y.dtype))
        down = base.down(inputs, self.lora_A.to(y.dtype))  # (..., r)
        return y + base.up(down, self.lora_B.to(y.dtype) * self.scale)

    def merge(self, weight: Tensor, bias: Tensor | None, base: BaseView) -> tuple[Tensor, Tensor | None]:
        change = base.compose(self.lora_A.to(weight.dtype), self.lora_B.to(weight.dtype))
        return weight + self.scale * change, bias

    def merge_fault(self, base: BaseView) -> str | None:
        return base.compose_fault()


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _by_pattern(pattern: dict[str, Any] | None, path: str, default: Any) -> Any:
    """The value of the first key that matches the end of `path` at a dot, as a regular expression."""
    return next((value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", path)), default)
