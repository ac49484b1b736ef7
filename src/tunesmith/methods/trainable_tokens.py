"""Trained rows of an embedding: new or chosen tokens learn, the rest of the vocabulary stays frozen.

    E'[i] = D[j] where i is the j-th trained token, else E[i];   an output head tied to E follows: W' = E'

No paper; beside LoRA it is `LoraConfig(trainable_token_indices=...)`. What is stored are the rows themselves, not their
difference, so a file also fits a base whose new tokens were filled with other random numbers.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter import LinearAdapter, TokenSettings
from ..bases.view import BaseView
from ..config import PeftConfig, config_class
from ..registry import register, register_part

TokenIndices = list[int] | dict[str, list[int]] | None


@config_class
class TrainableTokensConfig(PeftConfig):
    """Configuration of trained rows alone.

    Args:
        token_indices: the tokens to train.
        target_modules: name(s) of the embedding; None takes the model's input embedding.
        init_weights: True: the base's rows at first; False: random rows.
    """

    token_indices: list[int] | None = None
    target_modules: list[str] | str | None = None
    init_weights: bool = True

    method: ClassVar[str] = "TRAINABLE_TOKENS"
    usual_learning_rate: ClassVar[float] = 0.01

    def faults(self) -> list[str]:
        if not self.token_indices:
            return ["token_indices is empty; name at least one token to train"]
        return [*super().faults(), *index_faults(self.trainable_token_indices)]

    @property
    def trainable_token_indices(self) -> TokenIndices:
        """As LoRA's field of that name: the tokens, or by embedding."""
        names = [self.target_modules] if isinstance(self.target_modules, str) else self.target_modules
        tokens = list(self.token_indices or ())
        return dict.fromkeys(names, tokens) if names else tokens


def index_faults(wanted: TokenIndices) -> list[str]:
    """What is wrong with a `trainable_token_indices`, whatever the model."""
    by_name = wanted if isinstance(wanted, dict) else {"": wanted or []}
    faults = []
    for name, tokens in by_name.items():
        where = f"trainable_token_indices{f'[{name!r}]' if name else ''}"
        if name and not tokens:
            faults.append(f"{where} is empty; name at least one token to train")
        negative = [token for token in tokens if token < 0]
        if negative:
            faults.append(f"{where}: {negative[0]} is not a token id; ids start at 0")
        if len(set(tokens)) < len(tokens):
            faults.append(f"{where} lists a token twice")
    return faults


@register_part("_tokens")
@register(TrainableTokensConfig)
class TokenRows(LinearAdapter):
    """The trained rows `(tokens, dim)` of one embedding, or an output head that follows an embedding's rows."""

    tokens: Tensor  # (tokens,)
    sorted_tokens: Tensor
    order: Tensor  # (tokens,) sorted_tokens[i] is tokens[order[i]]

    def __init__(self, base: BaseView, config: PeftConfig, settings: TokenSettings) -> None:
        super().__init__(base, config, settings)
        tokens = torch.tensor(settings.tokens)
        self.starts_as_base = getattr(config, "init_weights", True)
        self.register_buffer("tokens", tokens, persistent=False)
        self.register_buffer("sorted_tokens", tokens.sort().values, persistent=False)
        self.register_buffer("order", tokens.argsort(), persistent=False)
        self.alone = isinstance(config, TrainableTokensConfig)  # rather than beside a method's own adapters
        if settings.follows is None:
            self.trainable_tokens_delta = nn.Parameter(torch.empty(len(tokens), base.shape[1]))

    def private_values(self) -> list[str]:
        return [f"weight[{token}]" for token in self.tokens.tolist()]

    @property
    def rows(self) -> Tensor:
        """`(tokens, dim)`: its own, or those of the embedding that it follows."""
        owner = self.owner
        assert isinstance(owner, TokenRows)
        return owner.trainable_tokens_delta

    def reset_parameters(self, base: BaseView) -> None:
        if "trainable_tokens_delta" not in self._parameters:
            return  # it follows another
        with torch.no_grad():
            rows = base.weight()[self.tokens] if self.starts_as_base else torch.randn_like(self.trainable_tokens_delta)
            self.trainable_tokens_delta.copy_(rows)

    def in_file(self, beside: bool) -> dict[str, Tensor]:
        if self.alone:  # the rows that it follows have a second name in files
            return {"trainable_tokens_delta": self.rows}
        return {f"token_adapter.{name}": tensor for name, tensor in super().in_file(beside).items()}

    def forward(self, x: Tensor, base: BaseView, *args: Any, **kwargs: Any) -> Tensor:
        y = base(x, *args, **kwargs)
        rows = self.rows.to(y.dtype)
        if not base.tokens_in:
            outputs = F.linear(x, rows, None if base.bias is None else base.bias[self.tokens])
            return y.index_copy(-1, self.tokens, outputs)
        place = torch.searchsorted(self.sorted_tokens, x).clamp_max(len(self.tokens) - 1)
        trained = (self.sorted_tokens[place] == x)[..., None]
        return torch.where(trained, F.embedding(self.order[place], rows) * base.output_scale, y)

    def merge(self, weight: Tensor, bias: Tensor | None, base: BaseView) -> tuple[Tensor, Tensor | None]:
        return weight.index_copy(0, self.tokens, self.rows.to(weight.dtype)), bias
