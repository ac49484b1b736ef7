"""`tunesmith generate`: text from a base model with an adapter."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import ConfigError
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


def generate(
    prompt: Annotated[str, typer.Option(help="The question, or the text to continue.")],
    adapter: Adapter = None,
    base: Base = None,
    template: TemplateName = None,
    load_in_4bit: LoadIn4bit = False,
    max_new_tokens: MaxNewTokens = 60,
    temperature: Temperature = 0.0,
    top_p: TopP = 0.9,
    repetition_penalty: RepetitionPenalty = 1.3,
    compare: Annotated[bool, typer.Option(help="Also show what the base alone writes.")] = False,
    seed: Seed = 0,
) -> None:
    """Answer a prompt, with or without an adapter. The template is the one that the adapter was trained with.

    \b
    Examples:
      tunesmith generate --adapter my-adapter --prompt "I want you to act as"
      tunesmith generate --adapter my-adapter --prompt "Name three tips." --compare
      tunesmith generate --adapter my-adapter --prompt "Once upon a time" --template none
    """
    if not prompt:
        raise ConfigError('the prompt is empty; give some text: --prompt "..."')
    from ..jobs import quiet
    from ..jobs.generator import Sampling

    sampling = Sampling(max_new_tokens, temperature, top_p, repetition_penalty, seed)
    quiet.hush()
    out = console()
    generator = load_generator(adapter, base, template, load_in_4bit)
    verbatim = generator.template.name == "none"
    text = generator.prompt([{"role": "user", "content": prompt}])

    def show(title: str) -> None:
        if compare:
            out.print(f"[bold]{title}[/bold]")
        out.print((prompt if verbatim else "") + generator.go_on(text, sampling), markup=False)

    if compare and adapter:
        with generator.bare():
            show(generator.base_name)
    show(str(adapter or generator.base_name))
