"""P-tuning: virtual tokens before the input, computed by a small trained encoder; only what it computes is kept.

    E' = [P; E(x)],   P = MLP(Q)  or  MLP(LSTM(Q)),   Q in R^{n x d} trained together with the encoder

Liu et al. 2021, "GPT Understands, Too", https://arxiv.org/abs/2103.10385 (section 3.2).
"""

from __future__ import annotations

from enum import Enum
from typing import Any, ClassVar

from torch import Tensor, nn

from ..adapter import PromptAdapter
from ..checks import not_positive, not_probability
from ..config import PromptConfig, config_class
from ..registry import register
from .parts import as_choice


class PromptEncoderReparameterizationType(str, Enum):
    """What computes the virtual tokens: three linear layers, or a bidirectional LSTM and two linear layers."""

    MLP = "MLP"
    LSTM = "LSTM"


@config_class
class PromptEncoderConfig(PromptConfig):
    """Configuration of P-tuning.

    Args:
        encoder_reparameterization_type: a `PromptEncoderReparameterizationType` or its name.
        encoder_hidden_size: width of the encoder; None takes the width of the base's embeddings.
        encoder_num_layers: layers of the LSTM (the MLP has three).
        encoder_dropout: probability of dropping values between layers of the LSTM while training.
    """

    encoder_reparameterization_type: PromptEncoderReparameterizationType | str = PromptEncoderReparameterizationType.MLP
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    method: ClassVar[str] = "P_TUNING"
    usual_learning_rate: ClassVar[float] = 0.005

    def __post_init__(self) -> None:
        kind = PromptEncoderReparameterizationType
        self.encoder_reparameterization_type = as_choice(kind, self.encoder_reparameterization_type)
        super().__post_init__()

    @property
    def trains_encoder(self) -> bool:
        return True

    def faults(self) -> list[str]:
        found = super().faults()
        if not isinstance(self.encoder_reparameterization_type, PromptEncoderReparameterizationType):
            found.append(f"encoder_reparameterization_type={self.encoder_reparameterization_type!r} must be one of MLP, LSTM")
        sizes = {"encoder_hidden_size": self.encoder_hidden_size, "encoder_num_layers": self.encoder_num_layers}
        return [*found, *not_positive(sizes), *not_probability({"encoder_dropout": self.encoder_dropout})]


@register(PromptEncoderConfig)
class PromptEncoder(PromptAdapter):
    """The virtual tokens of one adapter, `(num_virtual_tokens * submodules, dim)` in fp32, or their encoder."""

    @classmethod
    def prepare(cls, config: Any, model: nn.Module) -> None:
        config.encoder_hidden_size = config.encoder_hidden_size or config.token_dim

    @staticmethod
    def make_encoder(config: Any) -> nn.Module:
        return TokenEncoder(config)

    def reset_parameters(self, base: Any) -> None:
        if self.embedding is not None:
            nn.init.normal_(self.embedding)


class TokenEncoder(nn.Module):
    """What computes the virtual tokens while they are trained; all values start as PyTorch's layers do."""

    def __init__(self, config: PromptEncoderConfig) -> None:
        super().__init__()
        (rows, dim), hidden = PromptAdapter.shape(config), config.encoder_hidden_size
        assert hidden is not None
        self.embedding = nn.Embedding(rows, dim)
        if config.encoder_reparameterization_type == PromptEncoderReparameterizationType.MLP:
            self.lstm_head = None
            self.mlp_head = nn.Sequential(
                nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, dim)
            )
        else:
            layers = config.encoder_num_layers
            dropout = config.encoder_dropout if layers > 1 else 0.0  # it acts between layers
            self.lstm_head = nn.LSTM(dim, hidden, layers, dropout=dropout, bidirectional=True)
            self.mlp_head = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, dim))

    def forward(self) -> Tensor:
        tokens = self.embedding.weight  # (rows, dim)
        if self.lstm_head is not None:
            tokens = self.lstm_head(tokens)[0]  # (rows, 2 * hidden)
        return self.mlp_head(tokens)
