"""What a model writes after a text: the one place where commands generate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the most likely one at a temperature of 0."""

    max_new_tokens: int = 60
    temperature: float = 0.0
    top_p: float = 0.9
    repetition_penalty: float = 1.3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1 or self.repetition_penalty <= 0:
            raise ConfigError("needs --max-new-tokens of at least 1, --temperature of at least 0, --top-p above 0 and at most "
                              "1, --repetition-penalty above 0")  # fmt: skip

    def arguments(self) -> dict[str, Any]:
        """For `generate`."""
        random = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p} if self.temperature else {}
        return {
            "max_new_tokens": self.max_new_tokens,
            "repetition_penalty": self.repetition_penalty,
            "do_sample": False,
            **random,
        }


def continuation(model: Any, tokenizer: Any, ids: Sequence[int], sampling: Sampling) -> str:
    """The text that a handle or a base model writes after some tokens; at a temperature above 0 it seeds torch."""
    import torch

    if sampling.temperature:
        torch.manual_seed(sampling.seed)
    prompt = torch.tensor([list(ids)], device=next(model.parameters()).device)  # (1, T)
    made = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **sampling.arguments())
    return str(tokenizer.decode(made[0, prompt.shape[1] :], skip_special_tokens=True))
