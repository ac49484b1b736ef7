"""LLaMA-Adapter: trained tokens that the upper layers attend to beside the text, through a gate that starts at zero.

    y = attention(x) + W_o (g softmax(q k_P^T / sqrt(head_dim)) v_P),   k_P = W_k P,  v_P = W_v P,   g = 0 at first

Zhang et al. 2023, "LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention",
https://arxiv.org/abs/2303.16199 (sections 3.1 and 3.2). Files of GPT-2 mean the same without W_o.
"""

from __future__ import annotations

import math
import sys
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter import SublayerAdapter
from ..bases.architecture import hidden_size
from ..checks import not_positive
from ..config import Settings, TargetedConfig, config_class
from ..errors import ConfigError
from ..registry import register


@config_class
class AdaptionPromptConfig(TargetedConfig):
    """Configuration of LLaMA-Adapter.

    Args:
        adapter_len: trained tokens of each layer.
        adapter_layers: number of layers that get them, counted from the last.
        target_modules: name of the attention modules; None takes the architecture's.
    """

    adapter_len: int | None = None
    adapter_layers: int | None = None

    method: ClassVar[str] = "ADAPTION_PROMPT"
    usual_learning_rate: ClassVar[float] = 0.06

    def __post_init__(self) -> None:
        if isinstance(self.target_modules, str):
            self.target_modules = {self.target_modules}
        super().__post_init__()

    def faults(self) -> list[str]:
        found = super().faults()
        found += not_positive({"adapter_len": self.adapter_len, "adapter_layers": self.adapter_layers}, may_lack=False)
        if self.target_modules is not None and len(self.target_modules) > 1:
            found.append(f"target_modules={sorted(self.target_modules)} must be a single name, that of the attention modules")
        return found

    def to_dict(self) -> dict[str, Any]:
        """As the ecosystem's files hold it: one name, and none of the fields that only other methods have there."""
        values = super().to_dict()
        for name in ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "fan_in_fan_out"):
            if not values[name]:
                del values[name]
        return values | {"target_modules": next(iter(self.target_modules), None) if self.target_modules else None}

    def resolve_targets(self, model_type: str | None) -> None:
        if self.target_modules is None:
            self.target_modules = {"attn" if model_type == "gpt2" else "self_attn"}

    def chosen(self, paths: list[str]) -> list[str]:
        assert self.adapter_layers is not None
        if 0 < len(paths) < self.adapter_layers:
            raise ConfigError(
                f"adapter_layers={self.adapter_layers}, but there are {len(paths)} attention modules; use fewer layers"
            )
        return paths[-self.adapter_layers :]


@register(AdaptionPromptConfig)
class AdaptionPrompt(SublayerAdapter):
    """One attention's tokens `(1, adapter_len, dim)` and their gate `(1,)`.

    Queries, keys and values are computed by the attention's own projections, so adapters on these act here, too.
    """

    @classmethod
    def fault(cls, module: Any, config: AdaptionPromptConfig, settings: Settings) -> str | None:
        if hasattr(module, "c_attn") and not getattr(module, "is_cross_attention", True):
            return None
        if all(hasattr(module, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim")) and _rotary(module):
            return None
        return f"{type(module).__name__} is not an attention module that LLaMA-Adapter supports (such as Llama's and GPT-2's)"

    def __init__(self, module: nn.Module, config: AdaptionPromptConfig, settings: Settings) -> None:
        super().__init__(module, config, settings)
        width = hidden_size(module.config)
        self.adaption_prompt = nn.Parameter(torch.empty(1, config.adapter_len or 0, width))
        self.adaption_gate = nn.Parameter(torch.zeros(1))

    def reset_parameters(self, base: Any) -> None:
        nn.init.normal_(self.adaption_prompt)

    def forward(self, hidden: Tensor, module: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]  # (B, T, dim)
        prompt = self.adaption_prompt.to(hidden.dtype)  # (1, n, dim)
        project = _fused_projections if hasattr(module, "c_attn") else _rotary_projections
        queries, keys, values = project(module, x, prompt, kwargs)  # (B, heads, T, head_dim), (1, heads, n, head_dim)
        scores = queries @ keys.transpose(2, 3) / math.sqrt(module.head_dim)  # (B, heads, T, n)
        weights = F.softmax(scores, dim=-1, dtype=torch.float32) * self.adaption_gate
        mixed = (weights.to(values.dtype) @ values).transpose(1, 2).flatten(2)  # (B, T, heads * head_dim)
        return hidden + _projected(module, mixed).to(hidden.dtype)


def _fused_projections(module: Any, x: Tensor, prompt: Tensor, _: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """GPT-2: one projection for all three."""
    queries = module.c_attn(x).split(module.split_size, dim=2)[0]
    _, keys, values = module.c_attn(prompt).split(module.split_size, dim=2)
    queries, keys, values = (part.unflatten(2, (-1, module.head_dim)).transpose(1, 2) for part in (queries, keys, values))
    return queries, keys, values


def _rotary_projections(module: Any, x: Tensor, prompt: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Llama and similar models: queries are turned by their positions, the trained tokens have none."""
    queries, keys, values = (
        projection(tokens).unflatten(2, (-1, module.head_dim))
        for projection, tokens in ((module.q_proj, x), (module.k_proj, prompt), (module.v_proj, prompt))
    )
    if hasattr(module, "q_norm"):
        queries, keys = module.q_norm(queries), module.k_norm(keys)
    queries, keys, values = (part.transpose(1, 2) for part in (queries, keys, values))
    rotate = _rotary(module)
    assert rotate is not None
    queries, _ = rotate(queries, queries, *kwargs["position_embeddings"])
    groups = queries.shape[1] // keys.shape[1]  # query heads that share a key under grouped-query attention
    return queries, keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)


def _rotary(module: nn.Module) -> Any:
    """The architecture's own function that turns queries by their positions; None where it has none."""
    homes: Any = (sys.modules.get(cls.__module__) for cls in type(module).__mro__)
    return next((home.apply_rotary_pos_emb for home in homes if hasattr(home, "apply_rotary_pos_emb")), None)


def _projected(module: Any, mixed: Tensor) -> Tensor:
    """Through the output projection, whose bias the attention's own output has already."""
    if not hasattr(module, "o_proj"):
        return mixed
    bias = module.o_proj.bias
    return module.o_proj(mixed) if bias is None else module.o_proj(mixed) - bias
