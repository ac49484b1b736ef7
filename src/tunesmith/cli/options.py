"""Options that several verbs share, and what they stand for. Nothing here imports torch before a verb runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..jobs.generator import Generator

DATA_HELP = "csv, json, jsonl, parquet or txt file, or a Hub data set."
DTYPES = ("float32", "bfloat16", "float16")

# A model and its adapter
Adapter = Annotated[
    Path | None, typer.Option(help="Adapter folder or Hub id; omit it to use the base alone.", show_default=False)
]
Base = Annotated[
    str | None, typer.Option(help="Base model; default: the one the adapter names, else sprout.", show_default=False)
]
TemplateName = Annotated[str | None, typer.Option(help="Default: the one saved with the adapter.", show_default=False)]
LoadIn4bit = Annotated[bool, typer.Option("--load-in-4bit", help="Load the base in 4 bits.")]

# How text is generated
MaxNewTokens = Annotated[int, typer.Option(help="Stop after this many tokens.")]
Temperature = Annotated[float, typer.Option(help="0 always picks the most likely token.")]
TopP = Annotated[float, typer.Option(help="Sample from the most likely tokens, up to this total probability.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Values above 1 discourage repetition.")]
Seed = Annotated[int, typer.Option(help="Random seed for sampling.")]

# How a data file is read
TextColumn = Annotated[str | None, typer.Option(help="Use this column as plain text.", show_default=False)]
Columns = Annotated[
    list[str] | None, typer.Option(help="Names in your file: instruction=question,output=answer.", show_default=False)
]
Format = Annotated[
    str | None,
    typer.Option(
        help="alpaca, messages, sharegpt, prompt-completion or text; default: inferred from the columns.", show_default=False
    ),
]
MaxLength = Annotated[int, typer.Option(help="Truncate longer rows to this many tokens.")]


def load_generator(adapter: Path | None, base: str | None, template: str | None, load_in_4bit: bool) -> Generator:
    """The model that `--adapter`, `--base`, `--template` and `--load-in-4bit` name.

    Raises:
        AdapterFileError, ConfigError, UsageError: the adapter or the base cannot be loaded.
    """
    from ..jobs.generator import Generator

    return Generator(str(adapter) if adapter else None, base, template, bits=4 if load_in_4bit else 16)
