"""A base model with an adapter that generates, in the template that the adapter was trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from ..auto import load_base, load_tokenizer
from ..bases.architecture import longest_input
from ..bases.loading import stored_in
from ..config import read_config
from ..data.encode import encode_text
from ..data.formats import Message
from ..data.templates import Template, chosen
from ..model import PeftModel
from ..storage.folder import AdapterFolder
from .continuation import Sampling as Sampling
from .continuation import continuation
from .devices import to_accelerator


class Generator:
    """A base with or without an adapter.

    Args:
        adapter: a folder or Hub id; None generates with the bare base.
        base: the base's name; None uses the one that the adapter names, else sprout.
        template: a name or file; None uses the one saved with the adapter, else the tokenizer's chat template, else none.
        bits: of the base's linear weights: 4, 8, or 16 for what its files hold.

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
        """Inside, the base generates without the adapter."""
        with self.model.disable_adapter() if isinstance(self.model, PeftModel) else nullcontext():
            yield

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text that the model reads before it answers."""
        return self.template.write(messages, self.tokenizer, answer_next=True)

    def go_on(self, text: str, sampling: Sampling) -> str:
        """What the model writes after a text."""
        return continuation(self.model, self.tokenizer, encode_text(text, self.tokenizer), sampling)

    def answer(self, messages: Sequence[Message], sampling: Sampling) -> str:
        """The assistant's next message in a conversation."""
        return self.go_on(self.prompt(messages), sampling)

    def length(self, messages: Sequence[Message]) -> int:
        """How many tokens a conversation has."""
        return len(encode_text(self.prompt(messages), self.tokenizer))

    @property
    def room(self) -> int | None:
        """How many tokens the base can read; None where its configuration does not tell."""
        return longest_input(self.base.config)
