"""Prompt tuning: trained embeddings of virtual tokens before the input; nothing else learns.

    E' = [P; E(x)],   P in R^{n x d}

Lester, Al-Rfou, Constant 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning",
https://arxiv.org/abs/2104.08691 (section 2).
"""

from __future__ import annotations

from enum import Enum
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..adapter import PromptAdapter
from ..assets import resolve
from ..bases.stored_tensors import gathered
from ..config import PromptConfig, config_class
from ..errors import ConfigError
from ..registry import register
from .parts import as_choice


class PromptTuningInit(str, Enum):
    """Where the virtual tokens start: random numbers, random words of the vocabulary, or the words of a text."""

    RANDOM = "RANDOM"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    TEXT = "TEXT"


@config_class
class PromptTuningConfig(PromptConfig):
    """Configuration of prompt tuning.

    Args:
        prompt_tuning_init: a `PromptTuningInit` or its name.
        prompt_tuning_init_text: for TEXT. More tokens than `num_virtual_tokens` are cut off; fewer are repeated.
        tokenizer_name_or_path: whose tokens `prompt_tuning_init_text` is split into; for TEXT.
        tokenizer_kwargs: further arguments for `AutoTokenizer.from_pretrained`; for TEXT.
    """

    prompt_tuning_init: PromptTuningInit | str = PromptTuningInit.RANDOM
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None

    method: ClassVar[str] = "PROMPT_TUNING"
    usual_learning_rate: ClassVar[float] = 3e-2
    inits: ClassVar[type[Enum]] = PromptTuningInit

    def __post_init__(self) -> None:
        self.prompt_tuning_init = as_choice(self.inits, self.prompt_tuning_init)  # type: ignore[assignment]
        super().__post_init__()

    def faults(self) -> list[str]:
        found = super().faults()
        if not isinstance(self.prompt_tuning_init, self.inits):
            allowed = ", ".join(choice.value for choice in self.inits)
            found.append(f"prompt_tuning_init={self.prompt_tuning_init!r} must be one of {allowed}")
        if self.prompt_tuning_init == PromptTuningInit.TEXT:
            if not self.prompt_tuning_init_text:
                found.append("prompt_tuning_init=TEXT needs prompt_tuning_init_text")
            if not self.tokenizer_name_or_path:
                found.append("prompt_tuning_init=TEXT needs tokenizer_name_or_path")
        elif self.tokenizer_kwargs:
            found.append("tokenizer_kwargs is used only with prompt_tuning_init=TEXT")
        if self.tokenizer_kwargs and self.tokenizer_kwargs.get("trust_remote_code"):
            found.append("tokenizer_kwargs may not set trust_remote_code: an adapter file must not run code")
        return found


@register(PromptTuningConfig)
class PromptTuning(PromptAdapter):
    """The virtual tokens of one adapter, `(num_virtual_tokens * submodules, dim)` in fp32."""

    def reset_parameters(self, base: Any) -> None:
        config, words = self.config, base.get_input_embeddings()
        rows = self.embedding.shape[0]
        if config.prompt_tuning_init == PromptTuningInit.RANDOM:
            nn.init.normal_(self.embedding)
            return
        if config.prompt_tuning_init == PromptTuningInit.SAMPLE_VOCAB:
            ids = torch.randint(0, words.num_embeddings, (rows,))
        else:
            ids = _text_ids(config, rows, words.num_embeddings)
        with torch.no_grad(), gathered(words.parameters()):
            self.embedding.copy_(words(ids.to(words.weight.device)))


def _text_ids(config: PromptTuningConfig, rows: int, words: int) -> Tensor:
    """`rows` token ids of the initial text, cut off or repeated from the start.

    Raises:
        ConfigError: the tokenizer is not there, makes no tokens of the text, or is not the base's.
    """
    from transformers import AutoTokenizer

    name = config.tokenizer_name_or_path or ""
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve(name), **(config.tokenizer_kwargs or {}))
    except (OSError, ValueError) as error:
        raise ConfigError(f'tokenizer_name_or_path: "{name}" has no tokenizer that can be loaded; check the name') from error
    ids = tokenizer(config.prompt_tuning_init_text)["input_ids"]
    if not ids:
        raise ConfigError(f"prompt_tuning_init_text={config.prompt_tuning_init_text!r} has no tokens; give it some text")
    if max(ids) >= words:
        raise ConfigError(
            f'tokenizer_name_or_path: "{name}" gives token id {max(ids)}, but the base has {words} tokens; '
            "use the tokenizer of the base"
        )
    return torch.tensor((ids * (rows // len(ids) + 1))[:rows])
