"""`tunesmith chat`: a conversation with a base model and an adapter."""

from __future__ import annotations

import sys

from .generate import Adapter, Base, LoadIn4bit, MaxNewTokens, RepetitionPenalty, Seed, Temperature, TemplateName, TopP

KEYS = "/base without the adapter, /adapter with it, /new forgets what was said, /quit (or Ctrl-D)"


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
    """Talk with the model, in the form that the adapter was trained on.

    \b
    Examples:
      tunesmith chat --adapter my-adapter
      echo "Name three tips." | tunesmith chat --adapter my-adapter --temperature 0
    """
    from rich.console import Console

    from ..jobs import quiet
    from ..jobs.generator import Generator, Sampling

    sampling = Sampling(max_new_tokens, temperature, top_p, repetition_penalty, seed)
    quiet.hush()
    console = Console(highlight=False, soft_wrap=True)
    speaker = Generator(str(adapter) if adapter else None, base, template, bits=4 if load_in_4bit else 16)
    at_a_terminal = sys.stdin.isatty()
    if at_a_terminal:
        console.print(f"{adapter or speaker.base_name}, template {speaker.template.name}. {KEYS}")
    messages: list[dict[str, str]] = []
    with_adapter = True
    while True:
        if at_a_terminal:
            console.print("[bold]> [/bold]", end="")
        line = sys.stdin.readline()
        said = line.strip()
        if not line or said == "/quit":
            return
        if said in ("/base", "/adapter"):
            with_adapter = said == "/adapter"
            console.print("the adapter acts" if with_adapter else "the bare base")
        elif said == "/new":
            messages = []
            console.print("a new conversation")
        elif said.startswith("/"):
            console.print(f"no command {said}; there are: {KEYS}")
        elif said:
            messages.append({"role": "user", "content": said})
            while speaker.room and len(messages) > 1 and speaker.length(messages) + max_new_tokens > speaker.room:
                del messages[:2]  # the oldest question with its answer
                console.print("[dim](the beginning of the conversation no longer fits and is left out)[/dim]")
            if with_adapter:
                answer = speaker.answer(messages, sampling)
            else:
                with speaker.bare():
                    answer = speaker.answer(messages, sampling)
            messages.append({"role": "assistant", "content": answer})
            console.print(answer.strip(), markup=False)
