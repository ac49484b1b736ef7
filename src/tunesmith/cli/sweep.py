"""`tunesmith sweep`: a recipe with lists, every combination trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..jobs import sweeps
from .output import console, table


def sweep(
    recipe: Annotated[Path, typer.Argument(help="YAML file with settings, some of them lists.")],
    output_dir: Annotated[str | None, typer.Option(help="Folder for the runs.", show_default=False)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the combinations and exit.")] = False,
) -> None:
    """Train every combination of a recipe's lists. The results are shown in one table.

    \b
    Examples:
      tunesmith sweep recipe.yaml --dry-run
      tunesmith sweep recipe.yaml --output-dir sweep

    A list in recipe.yaml: `learning_rate: [1e-4, 1e-3]`. Finished runs are not repeated; interrupted ones are resumed.
    """
    flags = {"output_dir": output_dir} if output_dir else {}
    if dry_run:
        for name, _ in sweeps.combinations(recipe, flags):
            typer.echo(name)
        return
    rows = sweeps.run_all(recipe, flags)

    from ..data.text import perplexity

    numbers = ("before", "after", "seconds")
    shown = table("run", *numbers, numbers=numbers, title="Held-out perplexity, best first")
    shown.columns[0].overflow = "fold"
    for row in rows:
        perplexities = ["-" if row[key] is None else f"{perplexity(row[key]):.2f}" for key in ("before", "after")]
        shown.add_row(row["run"], *perplexities, f"{row['seconds']:.0f}")
    console(markup=False).print(shown, soft_wrap=False)
