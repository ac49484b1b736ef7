"""`tunesmith eval`: how well a base predicts a data file, with an adapter and without."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..data.files import check_folder
from ..data.formats import good_examples
from ..errors import ConfigError, DataError
from ..jobs import quiet
from ..jobs.recipe import columns_of
from .options import (
    DATA_HELP,
    Base,
    Columns,
    Format,
    LoadIn4bit,
    MaxLength,
    TemplateName,
    TextColumn,
    load_generator,
)
from .output import console, table

if TYPE_CHECKING:
    from rich.console import Console

    from ..data.encode import Encoded
    from ..data.formats import Example, Examples
    from ..jobs.generator import Generator


def evaluate(
    data: Annotated[str, typer.Option(help=DATA_HELP)],
    adapter: Annotated[Path | None, typer.Option(help="Adapter folder or Hub id.", show_default=False)] = None,
    base: Base = None,
    template: TemplateName = None,
    load_in_4bit: LoadIn4bit = False,
    text_column: TextColumn = None,
    columns: Columns = None,
    format: Format = None,
    completion_only_loss: Annotated[bool, typer.Option(help="Score only the answers.")] = True,
    max_length: MaxLength = 256,
    skip_bad_rows: Annotated[bool, typer.Option("--skip-bad-rows", help="Skip rows that cannot be used.")] = False,
    max_rows: Annotated[int | None, typer.Option(help="Use only this many rows, from the top.", show_default=False)] = None,
    samples: Annotated[int, typer.Option(help="Show answers to this many rows, from the top.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.", show_default=False)] = None,
) -> None:
    """Measure perplexity on a data file, with and without an adapter.

    \b
    Examples:
      tunesmith eval --data test.json --adapter my-adapter
      tunesmith eval --data test.json --adapter my-adapter --samples 3 --output scores.json
    """
    _check_counts(max_length, samples, max_rows)
    form = {"text_column": text_column, "columns": columns, "format": format, "skip_bad_rows": skip_bad_rows}
    found = _read(data, form, max_rows)
    if output is not None:
        check_folder(output.parent)
    quiet.hush()
    out = console()
    generator = load_generator(adapter, base, template, load_in_4bit)
    encoded = _encode(out, generator, found, completion_only_loss, max_length)
    losses = _measure(generator, encoded, with_adapter=adapter is not None)
    out.print(
        f"{data}: {len(encoded.examples)} rows, {found.format}, template {generator.template.name}; {encoded.cut} truncated to "
        f"{max_length} tokens, {encoded.empty} skipped"
    )
    _show_losses(out, losses, {"base": generator.base_name, "adapter": str(adapter)})
    for example in found.examples[:samples]:
        _show_sample(out, generator, example)
    if output is not None:
        numbers = {"data": data, "rows": len(encoded.examples), "cut": encoded.cut, "left_out": encoded.empty, "loss": losses}
        output.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


def _check_counts(max_length: int, samples: int, max_rows: int | None) -> None:
    if max_length < 2 or samples < 0:
        raise ConfigError(f"--max-length must be at least 2 and --samples at least 0, got {max_length} and {samples}")
    if max_rows is not None and max_rows < 1:
        raise ConfigError(f"--max-rows {max_rows} must be at least 1")


def _read(data: str, form: dict[str, Any], max_rows: int | None) -> Examples:
    found = good_examples(data, **{**form, "columns": columns_of(form["columns"])})
    return dataclasses.replace(found, examples=found.examples[:max_rows])


def _encode(out: Console, generator: Generator, found: Examples, completion_only: bool, max_length: int) -> Encoded:
    """Token ids and labels of the rows, written as the generator's template says.

    Raises:
        DataError: no row has anything to score.
    """
    from ..data.encode import encode
    from ..jobs.run import pieces_of

    if generator.template.name == "none" and found.format not in ("text", "prompt-completion"):
        out.print("[yellow]warning: the adapter has no template, so rows are used verbatim; --template sets one[/yellow]")
    rows = pieces_of(found, generator.template, generator.tokenizer, completion_only)
    encoded = encode(rows, generator.tokenizer, max_length)
    if not encoded.examples:
        raise DataError(f"no row of {found.path} has tokens to score among its first {max_length}; raise --max-length")
    return encoded


def _measure(generator: Generator, encoded: Encoded, with_adapter: bool) -> dict[str, float]:
    """Mean losses in nats per token, of the base alone and with the adapter."""
    from ..data.text import mean_loss, pad_id_of

    pad_id = pad_id_of(generator.tokenizer)
    with generator.bare():
        losses = {"base": mean_loss(generator.base, encoded.examples, pad_id)}
    if with_adapter:
        losses["adapter"] = mean_loss(generator.model, encoded.examples, pad_id)
    return losses


def _show_losses(out: Console, losses: dict[str, float], titles: dict[str, str]) -> None:
    from ..data.text import perplexity

    shown = table("model", "loss", "perplexity", numbers=("loss", "perplexity"))
    for name, loss in losses.items():
        shown.add_row(titles[name], f"{loss:.4f}", f"{perplexity(loss):.2f}")
    out.print(shown)


def _show_sample(out: Console, generator: Generator, example: Example) -> None:
    """A row's question, the model's answer and the row's own; nothing for a plain text, which asks nothing."""
    from ..jobs.generator import Sampling

    *asked, expected = example.messages
    if not asked:
        return
    out.print(f"\n[bold]{example.where}[/bold]")
    answer = generator.answer(asked, Sampling()).strip()
    for title, text in {"prompt": asked[-1]["content"], "answer": answer, "expected": expected["content"]}.items():
        out.print(f"[dim]{title}:[/dim] ", end="")
        out.print(text, markup=False)
