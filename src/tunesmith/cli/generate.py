"""`tunesmith generate`: text from a base model with an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError


def generate(
    prompt: Annotated[str, typer.Option(help="The text to go on from.")],
    adapter: Annotated[Path | None, typer.Option(help="Adapter folder or hub id; leave out for the bare base.")] = None,
    base: Annotated[str | None, typer.Option(help="Base model; default: the one the adapter names, else sprout.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Stop after so many tokens.")] = 60,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens of this total probability.")] = 0.9,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 avoids repetition.")] = 1.3,
    compare: Annotated[bool, typer.Option(help="Show the bare base's text, too.")] = False,
    seed: Annotated[int, typer.Option(help="Decides what is sampled.")] = 0,
) -> None:
    """Go on from a prompt.

    Example: tunesmith generate --adapter my-adapter --prompt "I want you to act as"
    """
    if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1 or repetition_penalty <= 0 or not prompt:
        raise ConfigError("needs a prompt, --max-new-tokens of at least 1, --temperature of at least 0, --top-p above 0 and "
                          "at most 1, --repetition-penalty above 0")  # fmt: skip
    import torch
    from rich.console import Console

    from ..auto import load_base, load_tokenizer
    from ..checkpoint.files import AdapterFolder
    from ..model import PeftModel
    from ..train import quiet

    quiet.hush()
    console = Console(highlight=False, soft_wrap=True)
    name = base or (AdapterFolder.find(adapter).config().base_model_name_or_path if adapter else None) or "sprout"
    bare, tokenizer = load_base(name).eval(), load_tokenizer(name)
    inputs = tokenizer(prompt, return_tensors="pt")
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {"do_sample": False}

    def show(title: str, model: Any) -> None:
        torch.manual_seed(seed)
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, repetition_penalty=repetition_penalty, **sampling)
        if compare:
            console.print(f"[bold]{title}[/bold]")
        console.print(tokenizer.decode(ids[0], skip_special_tokens=True), highlight=False, markup=False)

    if compare or not adapter:
        show(name, bare)
    if adapter:
        show(str(adapter), PeftModel.from_pretrained(bare, str(adapter)).eval())
