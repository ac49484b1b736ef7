"""`tunesmith eval`: how well a base predicts a data file, with an adapter and without."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError, DataError
from .generate import Base, LoadIn4bit, TemplateName
from .validate import Columns, Format, TextColumn


def evaluate(
    data: Annotated[str, typer.Option(help="csv, json, jsonl, parquet or txt file, or a hub data set.")],
    adapter: Annotated[Path | None, typer.Option(help="Adapter folder or hub id.", show_default=False)] = None,
    base: Base = None,
    template: TemplateName = None,
    load_in_4bit: LoadIn4bit = False,
    text_column: TextColumn = None,
    columns: Columns = None,
    format: Format = None,
    completion_only_loss: Annotated[bool, typer.Option(help="Measure the answers alone.")] = True,
    max_length: Annotated[int, typer.Option(help="Cut longer rows to so many tokens.")] = 256,
    skip_bad_rows: Annotated[bool, typer.Option("--skip-bad-rows", help="Leave rows out that cannot be used.")] = False,
    max_rows: Annotated[int | None, typer.Option(help="Take so many of the first rows.", show_default=False)] = None,
    samples: Annotated[int, typer.Option(help="Show answers to so many of the first rows.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Write the numbers into this json file.", show_default=False)] = None,
) -> None:
    """Measure the perplexity of a data file, with the adapter and without.

    \b
    Examples:
      tunesmith eval --data test.json --adapter my-adapter
      tunesmith eval --data test.json --adapter my-adapter --samples 3 --output scores.json
    """
    if max_length < 2 or samples < 0:
        raise ConfigError(f"needs --max-length of at least 2 and --samples of at least 0, got {max_length} and {samples}")
    if max_rows is not None and max_rows < 1:
        raise ConfigError(f"--max-rows {max_rows} must be at least 1")
    from rich.console import Console
    from rich.table import Table

    from ..data.files import check_folder
    from ..data.formats import good_examples
    from ..jobs.recipe import columns_of

    found = good_examples(
        data, text_column=text_column, columns=columns_of(columns), format=format, skip_bad_rows=skip_bad_rows
    )
    found = dataclasses.replace(found, examples=found.examples[:max_rows])
    if output is not None:
        check_folder(output.parent)

    from ..data.encode import encode
    from ..data.text import mean_loss, pad_id_of, perplexity
    from ..jobs import quiet, run
    from ..jobs.generator import Generator, Sampling

    quiet.hush()
    console = Console(highlight=False, soft_wrap=True)
    speaker = Generator(str(adapter) if adapter else None, base, template, bits=4 if load_in_4bit else 16)
    if speaker.template.name == "none" and found.format not in ("text", "prompt-completion"):
        console.print("[yellow]the adapter keeps no template, so the rows are taken verbatim; --template names one[/yellow]")
    rows = run.pieces_of(found, speaker.template, speaker.tokenizer, completion_only_loss)
    encoded = encode(rows, speaker.tokenizer, max_length)
    if not encoded.examples:
        raise DataError(f"no row of {data} has anything to measure within {max_length} tokens; raise --max-length")
    pad_id = pad_id_of(speaker.tokenizer)
    losses = {}
    with speaker.bare():
        losses["base"] = mean_loss(speaker.base, encoded.examples, pad_id)
    if adapter:
        losses["adapter"] = mean_loss(speaker.model, encoded.examples, pad_id)
    console.print(
        f"{data}: {len(encoded.examples)} rows, {found.format}, template {speaker.template.name}; {encoded.cut} cut to "
        f"{max_length} tokens, {encoded.empty} left out"
    )
    table = Table(box=None, pad_edge=False)
    for column in ("model", "loss", "perplexity"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, loss in losses.items():
        shown = speaker.base_name if name == "base" else str(adapter)
        table.add_row(shown, f"{loss:.4f}", f"{perplexity(loss):.2f}")
    console.print(table)
    for example in found.examples[:samples]:
        asked = example.messages[:-1]
        if not asked:
            break
        console.print(f"\n[bold]{example.where}[/bold]")
        for title, text in {
            "asked": asked[-1]["content"],
            "answer": speaker.answer(asked, Sampling()).strip(),
            "wanted": example.messages[-1]["content"],
        }.items():
            console.print(f"[dim]{title}:[/dim] ", end="")
            console.print(text, markup=False)
    if output is not None:
        numbers = {"data": data, "rows": len(encoded.examples), "cut": encoded.cut, "left_out": encoded.empty, "loss": losses}
        output.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
