"""`tunesmith validate`: what is in a data file, before anything is trained on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError, DataError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

TextColumn = Annotated[str | None, typer.Option(help="Take this column as plain text.", show_default=False)]
Columns = Annotated[
    list[str] | None, typer.Option(help="Your names of columns: instruction=question,output=answer.", show_default=False)
]
Format = Annotated[
    str | None,
    typer.Option(
        help="alpaca, messages, sharegpt, prompt-completion or text; default: told by the columns.", show_default=False
    ),
]


def validate(
    data: Annotated[str, typer.Argument(help="csv, json, jsonl, parquet or txt file, or a hub data set.")],
    base: Annotated[str, typer.Option("--base", "--model-name-or-path", help="Whose tokens are counted.")] = "sprout",
    text_column: TextColumn = None,
    columns: Columns = None,
    format: Format = None,
    template: Annotated[
        str | None, typer.Option(help="chat, human-assistant, instruction, none or a Jinja file.", show_default=False)
    ] = None,
    completion_only_loss: Annotated[bool, typer.Option(help="Train the answers alone.")] = True,
    max_length: Annotated[int, typer.Option(help="Longer rows would be cut.")] = 256,
) -> None:
    """Report every bad row, the lengths in tokens, and the first example with its trained part marked.

    \b
    Examples:
      tunesmith validate alpaca.json --base sprout
      tunesmith validate prompts.csv --text-column prompt --max-length 128

    Exit code 3 when rows are bad.
    """
    from rich.console import Console

    from ..data.formats import read_examples
    from ..jobs.recipe import columns_of

    if max_length < 2:
        raise ConfigError(f"max_length={max_length} must be at least 2")
    console = Console(highlight=False, soft_wrap=True)
    found = read_examples(data, text_column=text_column, columns=columns_of(columns), format=format)

    from ..auto import load_tokenizer
    from ..data.encode import encode
    from ..data.templates import chosen
    from ..jobs import quiet, run

    quiet.hush()
    tokenizer = load_tokenizer(base)
    form = chosen(template, found.format, tokenizer)
    rows, faults = run.written(found, form, tokenizer, completion_only_loss)
    faults = [*found.faults, *faults]
    console.print(f"{data}: {found.total} rows, {found.format}, template {form.name}")
    if rows:
        encoded = encode(rows, tokenizer, max_length)
        console.print(_lengths(encoded.lengths, max_length))
        console.print(f"{encoded.cut} of {len(rows)} rows are longer than {max_length} tokens and would be cut")
        if encoded.empty:
            console.print(f"{encoded.empty} of them would be left out: nothing trained is left of them")
        _show_first(console, rows[0], tokenizer)
    if faults:
        console.print(f"\n[bold red]{len(faults)} bad rows[/bold red]")
        for fault in faults:
            console.print(f"  {fault}", markup=False)
        raise DataError(f"{len(faults)} of {found.total} rows cannot be used; mend or remove them")
    console.print("\nno bad rows")


def _lengths(lengths: list[int], max_length: int) -> Table:
    """How long the rows are, in tokens, as numbers and as bars."""
    from rich.table import Table

    ordered = sorted(lengths)
    table = Table(box=None, pad_edge=False, title="Tokens per row", title_justify="left")
    for column in ("up to", "rows", ""):
        table.add_column(column, justify="left" if not column else "right")
    limits = sorted({max(1, ordered[-1] * step // 8) for step in range(1, 9)} | {min(max_length, ordered[-1])})
    counts = [sum(low < length <= high for length in ordered) for low, high in zip([0, *limits], limits)]
    for limit, count in zip(limits, counts):
        mark = "  <- max_length" if limit == max_length else ""
        table.add_row(str(limit), str(count), "█" * round(30 * count / max(counts)) + mark)
    at = {"shortest": 0, "half are up to": len(ordered) // 2, "9 of 10 up to": len(ordered) * 9 // 10, "longest": -1}
    table.caption = ", ".join(f"{name} {ordered[place]}" for name, place in at.items())
    table.caption_justify = "left"
    return table


def _show_first(console: Console, pieces: Any, tokenizer: Any) -> None:
    """The first example as the model reads it; what is trained stands out on a terminal, and between marks elsewhere."""
    from rich.text import Text

    from ..data.encode import encode_row
    from ..labels import IGNORED

    ids, labels = encode_row(pieces, tokenizer)
    marks = ("", "") if console.is_terminal and not console.no_color else ("⟦", "⟧")
    console.print("\nThe first example, its trained part marked:")
    start = 0
    for place in range(1, len(ids) + 1):
        if place < len(ids) and (labels[place] == IGNORED) == (labels[start] == IGNORED):
            continue
        text = tokenizer.decode(ids[start:place])
        trained = labels[start] != IGNORED
        shown = Text(f"{marks[0]}{text}{marks[1]}", style="bold green") if trained else Text(text, style="dim")
        console.print(shown, end="")
        start = place
    console.print()
    trained_count = sum(label != IGNORED for label in labels)
    console.print(f"{len(ids)} tokens, {trained_count} of them trained; the end of text is one of them")
