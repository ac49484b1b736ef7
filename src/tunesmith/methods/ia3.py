"""IA3: trained factors on activations, a few thousand numbers per model.

    y = l * (W x + b),  l in R^out      for attention's keys and values
    y = W (l * x) + b,  l in R^in       for the second feed-forward layer

Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
https://arxiv.org/abs/2205.05638 (section 3.3).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..adapter import LinearAdapter
from ..bases.view import BaseView
from ..config import Settings, TargetedConfig, config_class
from ..paths import ends_with, is_named
from ..registry import register
from .parts import not_linear_or_convolution

# The ecosystem's choices: (targets, those of them that scale their input), by `model_type`.
_TARGETS: dict[tuple[str, ...], tuple[tuple[str, ...], tuple[str, ...]]] = {
    ("llama", "mistral"): (("k_proj", "v_proj", "down_proj"), ("down_proj",)),
    ("gemma", "gemma2", "gemma3_text", "qwen2", "qwen3", "llama4"): (("q_proj", "v_proj", "down_proj"), ("down_proj",)),
    ("bloom",): (("query_key_value", "mlp.dense_4h_to_h"), ("mlp.dense_4h_to_h",)),
    ("gpt_neox", "falcon", "RefinedWeb", "RefinedWebModel"): (("query_key_value", "dense_4h_to_h"), ("dense_4h_to_h",)),
    ("gpt2", "gpt_bigcode"): (("c_attn", "mlp.c_proj"), ("mlp.c_proj",)),
    ("opt",): (("q_proj", "k_proj", "fc2"), ("fc2",)),
    ("bart", "phi"): (("q_proj", "v_proj", "fc2"), ("fc2",)),
    ("t5",): (("k", "v", "wo"), ("wo",)),
    ("mt5",): (("k", "v", "wi_1"), ()),
    ("bert", "roberta"): (("key", "value", "output.dense"), ("output.dense",)),
    ("deberta",): (("in_proj", "output.dense"), ("output.dense",)),
    ("deberta-v2",): (("key_proj", "value_proj", "output.dense"), ("output.dense",)),
    ("gptj",): (("q_proj", "v_proj", "fc_out"), ("fc_out",)),
    ("gpt_neo",): (("q_proj", "v_proj", "c_proj"), ("c_proj",)),
    ("mixtral",): (("k_proj", "v_proj", "w2"), ("w2",)),
}


@dataclass(frozen=True)
class IA3Settings(Settings):
    """Which side of a module the factors are on."""

    scales_input: bool


@config_class
class IA3Config(TargetedConfig):
    """Configuration of IA3.

    Args:
        feedforward_modules: which targets scale their input rather than their output; None takes those that usually do
            in this architecture.
        init_ia3_weights: True: factors of one (no change) at first; False: random factors.
    """

    feedforward_modules: list[str] | set[str] | str | None = None
    init_ia3_weights: bool = True

    method: ClassVar[str] = "IA3"
    usual_learning_rate: ClassVar[float] = 0.02
    ours_alone: ClassVar[tuple[str, ...]] = ("layers_to_transform", "layers_pattern")

    def __post_init__(self) -> None:
        if isinstance(self.feedforward_modules, (list, tuple)):
            self.feedforward_modules = set(self.feedforward_modules)
        super().__post_init__()

    def faults(self) -> list[str]:
        found, targets = super().faults(), self.target_modules
        for name in self.feedforward_modules or ():
            if isinstance(self.feedforward_modules, set) and isinstance(targets, set) and not _is_among(name, targets):
                found.append(f'feedforward_modules names "{name}", which is not among target_modules; name it there, too')
        return found

    @classmethod
    def understood(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The ecosystem's files name the architecture's usual feed-forward modules, targeted or not."""
        values = super().understood(values)
        targets, feedforward = values.get("target_modules"), values.get("feedforward_modules")
        if isinstance(targets, list) and isinstance(feedforward, list):
            return {**values, "feedforward_modules": [name for name in feedforward if _is_among(name, targets)]}
        return values

    def resolve_targets(self, model_type: str | None) -> None:
        targets, feedforward = next((usual for types, usual in _TARGETS.items() if model_type in types), ((), ()))
        if self.target_modules is None and targets:
            self.target_modules = set(targets)
        if self.feedforward_modules is None:
            wanted = self.target_modules
            self.feedforward_modules = {name for name in feedforward if isinstance(wanted, str) or _is_among(name, wanted)}
        super().resolve_targets(model_type)

    def settings(self, path: str) -> IA3Settings:
        return IA3Settings(scales_input=is_named(path, self.feedforward_modules or ()))


def _is_among(name: str, targets: Iterable[str] | None) -> bool:
    """Whether a feed-forward name is a target, names some of a target's modules, or the other way round."""
    return any(ends_with(name, target) or ends_with(target, name) for target in targets or ())


@register(IA3Config)
class IA3(LinearAdapter):
    """One module's factors: `(1, in)` on the input or `(out, 1)` on the output, of a convolution `(1, channels, 1, ...)`."""

    @classmethod
    def fault(cls, base: BaseView, config: IA3Config, settings: IA3Settings) -> str | None:
        return not_linear_or_convolution(base, "IA3")

    def __init__(self, base: BaseView, config: IA3Config, settings: IA3Settings) -> None:
        super().__init__(base, config, settings)
        out, inner, *kernel = base.shape
        self.groups: int = getattr(base.module, "groups", 1)
        self.scales_input = settings.scales_input
        self.starts_at_one = config.init_ia3_weights
        if kernel:
            shape: tuple[int, ...] = (1, inner * self.groups if self.scales_input else out, *(1 for _ in kernel))
        else:
            shape = (1, inner) if self.scales_input else (out, 1)
        self.ia3_l = nn.Parameter(torch.empty(shape))

    def reset_parameters(self, base: BaseView) -> None:
        if self.starts_at_one:
            nn.init.ones_(self.ia3_l)
        else:
            nn.init.normal_(self.ia3_l)

    def forward(self, x: Tensor, base: BaseView, *args: Any, **kwargs: Any) -> Tensor:
        factors = self.ia3_l[0] if self.ia3_l.dim() > 2 else self.ia3_l.flatten()  # (channels, 1, ...) or (features,)
        if self.scales_input:
            return base(x * factors.to(x.dtype), *args, **kwargs)
        y = base(x, *args, **kwargs)
        return y * factors.to(y.dtype)

    def merge(self, weight: Tensor, bias: Tensor | None, base: BaseView) -> tuple[Tensor, Tensor | None]:
        factors, (out, inner, *kernel) = self.ia3_l.flatten().to(weight.dtype), weight.shape
        if self.scales_input:  # each group of outputs reads its own share of the inputs
            columns = factors.view(self.groups, 1, inner).expand(-1, out // self.groups, -1).reshape(out, inner)
            return weight * columns.view(out, inner, *(1 for _ in kernel)), bias
        return weight * factors.view(out, *(1 for _ in weight.shape[1:])), None if bias is None else bias * factors
