"""`tunesmith validate`: what is in a data file, before anything is trained on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..data.formats import read_examples
from ..errors import ConfigError, DataError
from ..jobs import quiet
from ..jobs.recipe import columns_of
from .options import DATA_HELP, Columns, Format, MaxLength, TextColumn
from .output import console, counted, table

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..data.templates import Piece


def validate(
    data: Annotated[str, typer.Argument(help=DATA_HELP)],
    base: Annotated[str, typer.Option("--base", "--model-name-or-path", help="Base model whose tokenizer is used.")] = "sprout",
    text_column: TextColumn = None,
    columns: Columns = None,
    format: Format = None,
    template: Annotated[
        str | None, typer.Option(help="chat, human-assistant, instruction, none or a Jinja file.", show_default=False)
    ] = None,
    completion_only_loss: Annotated[bool, typer.Option(help="Train only on the answers.")] = True,
    max_length: MaxLength = 256,
) -> None:
    """Check a data file before training on it.

    \b
    Examples:
      tunesmith validate alpaca.json --base sprout
      tunesmith validate prompts.csv --text-column prompt --max-length 128

    Lists all bad rows, the lengths in tokens, and the first example with its trained part marked. The exit code is 3 if any
    row is bad.
    """
    if max_length < 2:
        raise ConfigError(f"max_length={max_length} must be at least 2")
    found = read_examples(data, text_column=text_column, columns=columns_of(columns), format=format)

    from ..auto import load_tokenizer
    from ..data.templates import chosen
    from ..jobs.run import written

    quiet.hush()
    out = console()
    tokenizer = load_tokenizer(base)
    form = chosen(template, found.format, tokenizer)
    rows, faults = written(found, form, tokenizer, completion_only_loss)
    out.print(f"{data}: {counted(found.total, 'row')}, {found.format}, template {form.name}")
    if rows:
        _show_lengths(out, rows, tokenizer, max_length)
        _show_first(out, rows[0], tokenizer)
    _show_faults(out, [*found.faults, *faults], found.total)


def _show_faults(out: Console, faults: list[str], total: int) -> None:
    """List all bad rows.

    Raises:
        DataError: there are some.
    """
    if not faults:
        out.print("\nno bad rows")
        return
    out.print(f"\n[bold red]{counted(len(faults), 'bad row')}[/bold red]")
    for fault in faults:
        out.print(f"  {fault}", markup=False)
    raise DataError(f"{len(faults)} of {total} rows cannot be used; fix or remove them")


def _show_lengths(out: Console, rows: list[list[Piece]], tokenizer: Any, max_length: int) -> None:
    """How long the rows are, and how many do not fit."""
    from ..data.encode import encode

    encoded = encode(rows, tokenizer, max_length)
    out.print(_histogram(encoded.lengths, max_length))
    out.print(f"{encoded.cut} of {len(rows)} rows are longer than {max_length} tokens and would be truncated")
    if encoded.empty:
        out.print(f"{counted(encoded.empty, 'row')} would be skipped: no trained tokens in the first {max_length}")


def _histogram(lengths: list[int], max_length: int) -> Table:
    """How long the rows are, in tokens, as numbers and as bars."""
    ordered = sorted(lengths)
    shown = table("up to", "rows", "", numbers=("up to", "rows"), title="Tokens per row")
    limits = sorted({max(1, ordered[-1] * step // 8) for step in range(1, 9)} | {min(max_length, ordered[-1])})
    counts = [sum(low < length <= high for length in ordered) for low, high in zip([0, *limits], limits)]
    for limit, count in zip(limits, counts):
        mark = "  <- max_length" if limit == max_length else ""
        shown.add_row(str(limit), str(count), "█" * round(30 * count / max(counts)) + mark)
    places = {"shortest": 0, "median": len(ordered) // 2, "90th percentile": len(ordered) * 9 // 10, "longest": -1}
    shown.caption = ", ".join(f"{name} {ordered[place]}" for name, place in places.items())
    shown.caption_justify = "left"
    return shown


def _show_first(out: Console, pieces: list[Piece], tokenizer: Any) -> None:
    """The first example as the model reads it; what is trained stands out on a terminal, and between marks elsewhere."""
    from rich.text import Text

    from ..data.encode import encode_row
    from ..labels import IGNORED

    ids, labels = encode_row(pieces, tokenizer)
    marks = ("", "") if out.is_terminal and not out.no_color else ("⟦", "⟧")
    out.print("\nFirst example, with the trained part marked:")
    start = 0
    for place in range(1, len(ids) + 1):
        if place < len(ids) and (labels[place] == IGNORED) == (labels[start] == IGNORED):
            continue
        text = tokenizer.decode(ids[start:place])
        trained = labels[start] != IGNORED
        out.print(Text(f"{marks[0]}{text}{marks[1]}", style="bold green") if trained else Text(text, style="dim"), end="")
        start = place
    out.print()
    trained_count = sum(label != IGNORED for label in labels)
    out.print(f"{len(ids)} tokens, {trained_count} of them trained, the end-of-text token included")
