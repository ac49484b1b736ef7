"""What verbs print to: the console, tables without lines, warnings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def console(markup: bool = True) -> Console:
    """Standard output. Long lines are left to the terminal, so that they can be copied; figures are not coloured."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True, markup=markup)


def table(*columns: str, numbers: tuple[str, ...] = (), title: str | None = None) -> Table:
    """An empty table without lines; the columns named in `numbers` are aligned to the right."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, title=title, title_justify="left")
    for column in columns:
        made.add_column(column, justify="right" if column in numbers else "left")
    return made


def warn(text: str) -> None:
    """A warning on standard error."""
    typer.secho(f"warning: {text}", fg="yellow", err=True)


def counted(count: int, noun: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
