"""Bottleneck adapters: a small network after, or beside, the attention and feed-forward blocks of each layer.

    sequential: y = h + s * up(f(down(h))),         h = block(x)
    parallel:   y = block(x) + s * up(f(down(x)))

Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", https://arxiv.org/abs/1902.00751 (section 2.1: after
both blocks); Pfeiffer et al. 2020, https://arxiv.org/abs/2005.00247 and https://arxiv.org/abs/2005.00052 (after the
feed-forward block only); He et al. 2021, https://arxiv.org/abs/2110.04366 (table 1: the scaled parallel adapter).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter import SublayerAdapter
from ..bases.view import view_of, view_type
from ..checks import not_positive, not_probability
from ..config import Settings, TargetedConfig, config_class
from ..errors import ConfigError
from ..registry import register

NON_LINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "swish": F.silu, "tanh": torch.tanh, "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu, "linear": nn.Identity(),
}  # fmt: skip

# (attention, feed-forward) modules whose outputs have not met the residual stream yet, by `model_type`.
_BLOCKS: dict[tuple[str, ...], tuple[str, str]] = {
    (
        "llama", "mistral", "mixtral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3", "qwen3_moe", "stablelm", "olmo",
        "olmo2", "cohere", "smollm3", "phi", "phi3", "starcoder2", "clip", "siglip",
    ): ("self_attn", "mlp"),
    ("gpt2", "gpt_bigcode", "gptj", "gpt_neo", "codegen", "modernbert"): ("attn", "mlp"),
    ("gpt_neox", "vit", "deit", "beit", "dinov2"): ("attention", "mlp"),
    ("falcon",): ("self_attention", "mlp"),
    ("bloom",): ("self_attention.dense", "mlp.dense_4h_to_h"),
    ("mpt",): ("attn", "ffn.down_proj"),
    (
        "opt", "bart", "mbart", "whisper", "pegasus", "m2m_100", "marian", "blenderbot", "xglm", "biogpt",
    ): ("self_attn", "fc2"),
    ("t5", "mt5", "umt5"): ("SelfAttention", "DenseReluDense"),
    (
        "bert", "roberta", "xlm-roberta", "electra", "layoutlm", "camembert", "deberta", "deberta-v2",
    ): ("attention.output.dense", "output.dense"),
    ("mpnet",): ("attention.attn", "output.dense"),
    ("distilbert",): ("attention", "ffn"),
}  # fmt: skip
# Parallel adapters need the block's input, so where the modules above are only its last linear map, the whole block.
_WHOLE = {"self_attention.dense": "self_attention", "mlp.dense_4h_to_h": "mlp", "ffn.down_proj": "ffn"}
_NO_BLOCK = ("fc2", "output.dense", "attention.output.dense")  # blocks that are not modules of their own


@dataclass(frozen=True)
class BottleneckSettings(Settings):
    """Of the small network: fields of the configuration, the same for every block."""

    bottleneck_size: int | None
    reduction_factor: int | float | None
    non_linearity: str
    scaling: float | str
    use_parallel_adapter: bool
    layer_norm_before: bool


@config_class
class BottleneckConfig(TargetedConfig):
    """Configuration of bottleneck adapters.

    Args:
        bottleneck_size: width of the small network.
        reduction_factor: instead of `bottleneck_size`, the block's width divided by this (16 when neither is given).
        non_linearity: "relu", "gelu", "silu", "swish", "tanh", "sigmoid", "leaky_relu" or "linear".
        adapter_dropout: probability of dropping an input of the small network while training.
        scaling: the factor s: a number, or "learned" (one trained number per adapter, 1 at first).
        style: which blocks, when `target_modules` is None: "houlsby" (attention and feed-forward), "pfeiffer"
            (feed-forward) or "parallel" (feed-forward, beside it).
        use_parallel_adapter: beside the blocks rather than after them; style="parallel" sets it.
        layer_norm_before: normalise the input of the small network (trained scale and shift).
        init_weights: "zero" (no change at first) or "bert" (normal with deviation 0.02, as
            BERT itself starts: almost no change).
        target_modules: names or a regular expression of blocks, or of linear modules that end them.
    """

    bottleneck_size: int | None = None
    reduction_factor: int | float | None = None
    non_linearity: str = "relu"
    adapter_dropout: float = 0.0
    scaling: float | str = 1.0
    style: str = "houlsby"
    use_parallel_adapter: bool = False
    layer_norm_before: bool = False
    init_weights: str = "zero"

    method: ClassVar[str] = "BOTTLENECK"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.use_parallel_adapter = self.use_parallel_adapter or self.style == "parallel"

    def faults(self) -> list[str]:
        found = super().faults()
        found += not_positive({"bottleneck_size": self.bottleneck_size})
        if self.reduction_factor is not None and not 0 < self.reduction_factor < math.inf:
            found.append(f"reduction_factor={self.reduction_factor} must be a number above 0")
        if self.bottleneck_size is not None and self.reduction_factor is not None:
            found.append("bottleneck_size and reduction_factor both set the size; give only one of them")
        found += not_probability({"adapter_dropout": self.adapter_dropout})
        if self.scaling != "learned" and (isinstance(self.scaling, str) or not math.isfinite(self.scaling)):
            found.append(f'scaling={self.scaling!r} must be a finite number or "learned"')
        for name, allowed in {
            "non_linearity": list(NON_LINEARITIES),
            "style": ["houlsby", "pfeiffer", "parallel"],
            "init_weights": ["zero", "bert"],
        }.items():
            if getattr(self, name) not in allowed:
                found.append(f"{name}={getattr(self, name)!r} must be one of {', '.join(allowed)}")
        if self.target_modules == "all-linear":
            found.append(
                'target_modules="all-linear" names the linear layers inside the blocks; name the blocks, or leave it out'
            )
        return found

    def resolve_targets(self, model_type: str | None) -> None:
        if self.target_modules is not None:
            return
        blocks = next((names for types, names in _BLOCKS.items() if model_type in types), None)
        if blocks is None:
            raise ConfigError(
                f'the attention and feed-forward blocks of "{model_type}" are not known; name them in target_modules, '
                'e.g. target_modules=["self_attn", "mlp"]'
            )
        wanted: tuple[str, ...] = blocks if self.style == "houlsby" else blocks[1:]
        if self.use_parallel_adapter:
            if any(name in _NO_BLOCK for name in wanted):
                raise ConfigError(
                    f'the feed-forward block of "{model_type}" is not a module of its own, so nothing can run beside it; '
                    'use style="houlsby" or "pfeiffer", or name whole blocks in target_modules'
                )
            wanted = tuple(_WHOLE.get(name, name) for name in wanted)
        elif self.style == "pfeiffer" and blocks[0].endswith(f".{blocks[1]}"):  # the one's name is an ending of the other's
            self.exclude_modules = _with_one_more(self.exclude_modules, blocks[0])
        self.target_modules = set(wanted)

    def settings(self, path: str) -> BottleneckSettings:
        return BottleneckSettings(**{field.name: getattr(self, field.name) for field in fields(BottleneckSettings)})


def _with_one_more(excluded: Any, name: str) -> Any:
    if isinstance(excluded, str):
        return rf"({excluded})|(.*\.)?{name}"
    return {*(excluded or ()), name}


@register(BottleneckConfig)
class Bottleneck(SublayerAdapter):
    """The small network of one block: `down` `(size, in)`, `up` `(out, size)`, both with biases."""

    @classmethod
    def fault(cls, base: nn.Module, config: BottleneckConfig, settings: BottleneckSettings) -> str | None:
        if widths(base) is None:
            return f"the output width of {type(base).__name__} cannot be determined; name a block of linear modules"
        return None

    def __init__(self, module: nn.Module, config: BottleneckConfig, settings: BottleneckSettings) -> None:
        super().__init__(module, config, settings)
        found = widths(module)
        assert found is not None
        self.parallel = config.use_parallel_adapter
        width_in, width_out = found if self.parallel else (found[1], found[1])
        size = config.bottleneck_size or max(1, int(width_out // (config.reduction_factor or 16)))
        self.starts_as_base = config.init_weights == "zero"
        self.activation = config.non_linearity
        self.dropout = nn.Dropout(config.adapter_dropout)
        self.norm = nn.LayerNorm(width_in) if config.layer_norm_before else None
        self.down = nn.Linear(width_in, size)
        self.up = nn.Linear(size, width_out)
        self.scale = nn.Parameter(torch.ones(1)) if config.scaling == "learned" else None
        self.fixed_scale = 1.0 if isinstance(config.scaling, str) else config.scaling
        self.input_name = list(inspect.signature(type(module).forward).parameters)[1]

    def reset_parameters(self, base: nn.Module) -> None:
        for linear in (self.down, self.up):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        if self.starts_as_base:
            nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
            nn.init.zeros_(self.up.weight)

    def forward(self, hidden: Tensor, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        x = hidden if not self.parallel else args[0] if args else kwargs[self.input_name]
        x = x.to(hidden.dtype)
        if self.norm is not None:
            x = F.layer_norm(x, x.shape[-1:], self.norm.weight.to(x.dtype), self.norm.bias.to(x.dtype), self.norm.eps)
        small = NON_LINEARITIES[self.activation](_through(self.down, self.dropout(x)))  # (..., size)
        change = _through(self.up, small)  # (..., out)
        scale = self.fixed_scale if self.scale is None else self.scale.to(change.dtype)
        return hidden + scale * change


def _through(linear: nn.Linear, x: Tensor) -> Tensor:
    """`linear(x)` in the type of `x`, which may be narrower than the trained values' own."""
    return F.linear(x, linear.weight.to(x.dtype), linear.bias.to(x.dtype))


def widths(module: nn.Module) -> tuple[int, int] | None:
    """Sizes of the last dimension of a block's input and output, None where they cannot be told.

    A linear module says its own. A block reads and writes the residual stream: its first linear module reads what its
    last one writes. Where these differ (a router among experts), the size that the block or a part of it notes counts.
    """
    if (found := _linear_widths(module)) is not None:
        return found
    linear = [sizes for part in module.modules() if (sizes := _linear_widths(part)) is not None]
    if linear and linear[0][0] == linear[-1][1]:
        return linear[0][0], linear[0][0]
    parts: list[Any] = [module, getattr(module, "config", None), *module.children()]
    noted = (getattr(part, name, None) for part in parts for name in ("hidden_size", "d_model", "hidden_dim", "embed_dim"))
    size = next((size for size in noted if isinstance(size, int)), None)
    return None if size is None else (size, size)


def _linear_widths(module: nn.Module) -> tuple[int, int] | None:
    """`(in, out)` of a linear map of vectors; None for anything else."""
    if view_type(module) is None:
        return None
    view = view_of(module)
    shape = view.shape
    return None if view.tokens_in or len(shape) != 2 else (shape[1], shape[0])
