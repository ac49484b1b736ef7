"""`tunesmith chat`: a conversation with a base model and an adapter."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING

from .options import (
    Adapter,
    Base,
    LoadIn4bit,
    MaxNewTokens,
    RepetitionPenalty,
    Seed,
    Temperature,
    TemplateName,
    TopP,
    load_generator,
)
from .output import console

if TYPE_CHECKING:
    from ..jobs.generator import Generator, Sampling

COMMANDS = "/base: without the adapter, /adapter: with it, /new: new conversation, /quit or Ctrl-D: leave"


def chat(
    adapter: Adapter = None,
    base: Base = None,
    template: TemplateName = None,
    load_in_4bit: LoadIn4bit = False,
    max_new_tokens: MaxNewTokens = 200,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.9,
    repetition_penalty: RepetitionPenalty = 1.1,
    seed: Seed = 0,
) -> None:
    """Chat with a base model and an adapter. The template is the one that the adapter was trained with.

    \b
    Examples:
      tunesmith chat --adapter my-adapter
      echo "Name three tips." | tunesmith chat --adapter my-adapter --temperature 0
    """
    from ..jobs import quiet
    from ..jobs.generator import Sampling

    sampling = Sampling(max_new_tokens, temperature, top_p, repetition_penalty, seed)
    quiet.hush()
    out = console()
    generator = load_generator(adapter, base, template, load_in_4bit)
    conversation = Conversation(generator, sampling)
    at_a_terminal = sys.stdin.isatty()
    if at_a_terminal:
        out.print(f"{adapter or generator.base_name}, template {generator.template.name}. {COMMANDS}")
    while True:
        if at_a_terminal:
            out.print("[bold]> [/bold]", end="")
        line = sys.stdin.readline()
        text = line.strip()
        if not line or text == "/quit":
            return
        if text.startswith("/"):
            out.print(conversation.command(text))
        elif text:
            answer, dropped = conversation.ask(text)
            for _ in range(dropped):
                out.print("[dim](the conversation no longer fits; its oldest question and answer were dropped)[/dim]")
            out.print(answer, markup=False)


class Conversation:
    """What was said so far, and whether the adapter answers."""

    def __init__(self, generator: Generator, sampling: Sampling) -> None:
        self.generator = generator
        self.sampling = sampling
        self.messages: list[dict[str, str]] = []
        self.with_adapter = True

    def command(self, text: str) -> str:
        """Carry out one of `COMMANDS`; returns what to tell."""
        if text == "/new":
            self.messages = []
            return "new conversation"
        if text not in ("/base", "/adapter"):
            return f"unknown command {text}; commands are {COMMANDS}"
        self.with_adapter = text == "/adapter"
        return "answering with the adapter" if self.with_adapter else "answering with the base alone"

    def ask(self, text: str) -> tuple[str, int]:
        """`(answer, number of old questions that were dropped with their answers to make room)`."""
        generator = self.generator
        self.messages.append({"role": "user", "content": text})
        dropped = 0
        while generator.room and len(self.messages) > 1 and self._tokens() > generator.room:
            del self.messages[:2]
            dropped += 1
        with nullcontext() if self.with_adapter else generator.bare():
            answer = generator.answer(self.messages, self.sampling)
        self.messages.append({"role": "assistant", "content": answer})
        return answer.strip(), dropped

    def _tokens(self) -> int:
        """Tokens of the conversation, the longest possible answer included."""
        return self.generator.length(self.messages) + self.sampling.max_new_tokens
