"""A base model and an adapter that answer, in the form that the adapter was trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from ..auto import load_base, load_tokenizer
from ..bases.architecture import longest_input
from ..bases.loading import stored_in
from ..config import read_config
from ..data.encode import encode_text
from ..data.formats import Message
from ..data.templates import Template, chosen
from ..errors import ConfigError
from ..model import PeftModel
from ..storage.folder import AdapterFolder
from .devices import to_accelerator


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: the likeliest ones at a temperature of 0."""

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
        chance = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p} if self.temperature else {}
        return {
            "max_new_tokens": self.max_new_tokens,
            "repetition_penalty": self.repetition_penalty,
            "do_sample": False,
            **chance,
        }


class Generator:
    """A base with or without an adapter.

    Args:
        adapter: a folder or hub id; None speaks with the bare base.
        base: the base's name; None takes the one that the adapter names, else sprout.
        template: a name or file; None takes the one kept beside the adapter, else the tokenizer's chat template, else none.
        bits: in how many the base's linear maps are stored: 4, 8, or 16 for what the files hold.

    Raises:
        AdapterFileError, ConfigError, UsageError: the adapter or the base cannot be loaded.
    """

    def __init__(self, adapter: str | None, base: str | None = None, template: str | None = None, bits: int = 16) -> None:
        named = read_config(AdapterFolder.find(adapter)).base_model_name_or_path if adapter else None
        self.base_name = base or named or "sprout"
        kept = Template.of_adapter(adapter) if adapter and template is None else None
        self.tokenizer = load_tokenizer(self.base_name)
        self.template = kept or chosen(template or (None if self.tokenizer.chat_template and not adapter else "none"),
                                       "messages", self.tokenizer)  # fmt: skip
        self.base = to_accelerator(load_base(self.base_name, **stored_in(bits))).eval()
        self.model: Any = PeftModel.from_pretrained(self.base, adapter).eval() if adapter else self.base

    @contextmanager
    def bare(self) -> Iterator[None]:
        """Inside, the base speaks alone."""
        with self.model.disable_adapter() if isinstance(self.model, PeftModel) else nullcontext():
            yield

    def prompt(self, messages: Sequence[Message]) -> str:
        """What the model reads before it answers."""
        return self.template.write(messages, self.tokenizer, answer_next=True)

    def go_on(self, text: str, sampling: Sampling) -> str:
        """What the model writes behind a text."""
        import torch

        torch.manual_seed(sampling.seed)
        ids = torch.tensor([encode_text(text, self.tokenizer)], device=next(self.base.parameters()).device)
        made = self.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **sampling.arguments())
        return str(self.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))

    def answer(self, messages: Sequence[Message], sampling: Sampling) -> str:
        """The assistant's next words in a conversation."""
        return self.go_on(self.prompt(messages), sampling)

    def length(self, messages: Sequence[Message]) -> int:
        """Tokens of a conversation."""
        return len(encode_text(self.prompt(messages), self.tokenizer))

    @property
    def room(self) -> int | None:
        """How many tokens the base can read; None where it does not say."""
        return longest_input(self.base.config)
