"""Prefix tuning: trained keys and values of virtual tokens, before those of the input in every self-attention layer.

    attention_i(Q, [K_P,i; K], [V_P,i; V]),   P in R^{n x 2 layers dim},   P = MLP(Q_P) with `prefix_projection`

Li, Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", https://arxiv.org/abs/2101.00190
(section 4); without projection, for understanding too: Liu et al. 2021, "P-Tuning v2", https://arxiv.org/abs/2110.07602.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter import PromptAdapter
from ..checks import not_positive
from ..config import PromptConfig, config_class
from ..registry import register
from ..runtime import prefix


@config_class
class PrefixTuningConfig(PromptConfig):
    """Configuration of prefix tuning.

    Args:
        prefix_projection: train an encoder that computes the keys and values, rather than these themselves.
        encoder_hidden_size: width of that encoder; None takes the width of the keys.
        init_weights: None: random at first; "zero": keys and values of zero.
    """

    prefix_projection: bool = False
    encoder_hidden_size: int | None = None
    init_weights: Literal["zero"] | None = None

    method: ClassVar[str] = "PREFIX_TUNING"
    usual_learning_rate: ClassVar[float] = 0.05

    @property
    def trains_encoder(self) -> bool:
        return self.prefix_projection

    def faults(self) -> list[str]:
        return [*super().faults(), *not_positive({"encoder_hidden_size": self.encoder_hidden_size})]


@register(PrefixTuningConfig)
class PrefixTuning(PromptAdapter):
    """The prefix of one adapter, `(n, layers * 2 * dim)` in fp32, or its encoder; `adapter(i)` is layer i's part of it."""

    in_cache = True

    @classmethod
    def prepare(cls, config: Any, model: nn.Module) -> None:
        prefix.fill_in(config, model)
        config.encoder_hidden_size = config.encoder_hidden_size or config.token_dim

    @staticmethod
    def shape(config: Any) -> tuple[int, int]:
        return config.num_virtual_tokens, config.num_layers * 2 * config.token_dim

    @staticmethod
    def make_encoder(config: Any) -> nn.Module | None:
        return PrefixEncoder(config) if config.prefix_projection else None

    def reset_parameters(self, base: Any) -> None:
        zero = self.config.init_weights == "zero"
        if self.encoder is None:
            (nn.init.zeros_ if zero else nn.init.normal_)(self.embedding)
        elif zero:
            nn.init.zeros_(self.encoder.transform[-1].weight)
            nn.init.zeros_(self.encoder.transform[-1].bias)

    def forward(self, layer: int) -> Tensor:
        """Keys and values of one layer, `(2, heads, n, head_dim)`.

        The ecosystem's files give an encoder-decoder as many parts as its decoder has layers, but two to each layer, so
        that they are used up halfway and begin again; the second, meant for cross-attention, stays unused.
        """
        config = self.config
        part = layer * config.num_transformer_submodules % config.num_layers
        columns = slice(part * 2 * config.token_dim, (part + 1) * 2 * config.token_dim)
        values = self.embedding[:, columns] if self.encoder is None else self.encoder(columns)  # (n, 2 * dim)
        return values.unflatten(1, (2, config.num_attention_heads, -1)).permute(1, 2, 0, 3)


class PrefixEncoder(nn.Module):
    """What computes the prefix while it is trained."""

    def __init__(self, config: PrefixTuningConfig) -> None:
        super().__init__()
        hidden, (rows, width) = config.encoder_hidden_size, PrefixTuning.shape(config)
        assert hidden is not None and config.token_dim is not None
        self.embedding = nn.Embedding(rows, config.token_dim)
        self.transform: Any = nn.Sequential(nn.Linear(config.token_dim, hidden), nn.Tanh(), nn.Linear(hidden, width))

    def forward(self, columns: slice = slice(None)) -> Tensor:
        """Some columns of the prefix, `(n, columns)`; by default all."""
        first, activation, last = self.transform
        hidden = activation(first(self.embedding.weight))  # (n, hidden)
        return F.linear(hidden, last.weight[columns], last.bias[columns])
