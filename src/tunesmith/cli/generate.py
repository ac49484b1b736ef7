"""`tunesmith generate`: text from a base model with an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError

Adapter = Annotated[
    Path | None, typer.Option(help="Adapter folder or hub id; leave out for the bare base.", show_default=False)
]
Base = Annotated[
    str | None, typer.Option(help="Base model; default: the one the adapter names, else sprout.", show_default=False)
]
TemplateName = Annotated[str | None, typer.Option(help="Default: the one kept with the adapter.", show_default=False)]
LoadIn4bit = Annotated[bool, typer.Option("--load-in-4bit", help="Store the base in 4 bits.")]
MaxNewTokens = Annotated[int, typer.Option(help="Stop after so many tokens.")]
Temperature = Annotated[float, typer.Option(help="0 always takes the likeliest token.")]
TopP = Annotated[float, typer.Option(help="Sample from the likeliest tokens of this total probability.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1 avoids repetition.")]
Seed = Annotated[int, typer.Option(help="Decides what is sampled.")]


def generate(
    prompt: Annotated[str, typer.Option(help="The question, or the text to go on from.")],
    adapter: Adapter = None,
    base: Base = None,
    template: TemplateName = None,
    load_in_4bit: LoadIn4bit = False,
    max_new_tokens: MaxNewTokens = 60,
    temperature: Temperature = 0.0,
    top_p: TopP = 0.9,
    repetition_penalty: RepetitionPenalty = 1.3,
    compare: Annotated[bool, typer.Option(help="Show the bare base's text, too.")] = False,
    seed: Seed = 0,
) -> None:
    """Answer a prompt in the form that the adapter was trained on.

    \b
    Examples:
      tunesmith generate --adapter my-adapter --prompt "I want you to act as"
      tunesmith generate --adapter my-adapter --prompt "Name three tips." --compare
      tunesmith generate --adapter my-adapter --prompt "Go on from here" --template none
    """
    if not prompt:
        raise ConfigError('needs a prompt: --prompt "..."')
    from rich.console import Console

    from ..jobs import quiet
    from ..jobs.generator import Generator, Sampling

    sampling = Sampling(max_new_tokens, temperature, top_p, repetition_penalty, seed)
    quiet.hush()
    console = Console(highlight=False, soft_wrap=True)
    speaker = Generator(str(adapter) if adapter else None, base, template, bits=4 if load_in_4bit else 16)
    verbatim = speaker.template.name == "none"
    text = speaker.prompt([{"role": "user", "content": prompt}])

    def show(title: str) -> None:
        if compare:
            console.print(f"[bold]{title}[/bold]")
        console.print((prompt if verbatim else "") + speaker.go_on(text, sampling), markup=False)

    if compare and adapter:
        with speaker.bare():
            show(speaker.base_name)
    show(str(adapter or speaker.base_name))
