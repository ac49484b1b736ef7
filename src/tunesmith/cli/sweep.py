"""`tunesmith sweep`: a recipe with lists, every combination trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def sweep(
    recipe: Annotated[Path, typer.Argument(help="A yaml file of settings, some of them lists.")],
    output_dir: Annotated[str | None, typer.Option(help="Where the runs are written.", show_default=False)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the combinations, and stop.")] = False,
) -> None:
    """Train every combination of a recipe's lists, and end in one table.

    \b
    Examples:
      tunesmith sweep recipe.yaml --dry-run
      tunesmith sweep recipe.yaml --output-dir sweep

    In recipe.yaml: `learning_rate: [1e-4, 1e-3]`. Runs that are finished are not repeated, others gone on with.
    """
    from ..jobs import sweeps

    flags = {"output_dir": output_dir} if output_dir else {}
    if dry_run:
        for name, _ in sweeps.combinations(recipe, flags):
            typer.echo(name)
        return
    from rich.console import Console
    from rich.table import Table

    from ..data.text import perplexity

    rows = sweeps.run_all(recipe, flags)
    table = Table(box=None, pad_edge=False, title="Held-out perplexity, best first", title_justify="left")
    table.add_column("run", overflow="fold")
    for column in ("before", "after", "seconds"):
        table.add_column(column, justify="right")
    for row in rows:
        perplexities = ["-" if row[key] is None else f"{perplexity(row[key]):.2f}" for key in ("before", "after")]
        table.add_row(row["run"], *perplexities, f"{row['seconds']:.0f}")
    Console(highlight=False, markup=False).print(table)
