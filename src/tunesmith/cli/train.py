"""`tunesmith train`: a data file to an adapter. Its flags are the fields of `Settings`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..jobs.recipe import FIELDS, RECIPE_FILE
from ..jobs.settings import Settings
from .output import console, table
from .setting_flags import give_signature, resolve_settings

HELP = """Train an adapter on your own data.

\b
Examples:
  tunesmith train --data prompts.csv --text-column prompt --output-dir my-adapter
  tunesmith train --data alpaca.json --method lora --learning-rate 1e-3
  tunesmith train recipe.yaml --learning-rate 1e-4    flags override the recipe
  tunesmith train --resume --output-dir my-adapter    resumes an interrupted run

Settings come from the recipe, then TUNESMITH_* environment variables, then flags; the last one wins. --settings lists them all.
"""


def train(recipe: Path | None, resume: bool, dry_run: bool, settings: bool, **flags: Any) -> None:
    if settings:
        _list_settings()
        return
    recorded = Path(flags.get("output_dir") or Settings.output_dir) / RECIPE_FILE
    if resume and recipe is None and recorded.is_file():
        recipe = recorded
    values = resolve_settings(recipe, flags)
    if recipe is not None and recipe == recorded:
        values["output_dir"] = str(recorded.parent)
    if dry_run:
        from ..jobs.recipe import as_yaml

        typer.echo(as_yaml(Settings(**values)), nl=False)
        return
    from ..jobs import run

    run.from_values(values, resume)


def _list_settings() -> None:
    shown = table("setting", "default", "description")
    for column in shown.columns[:2]:
        column.no_wrap = True
    for name, field in FIELDS.items():
        default: Any = {} if callable(field.default_factory) else field.default
        shown.add_row(name, str(default), field.metadata["help"])
    console(markup=False).print(shown, soft_wrap=False)


give_signature(
    train,
    HELP,
    ("resume", False, Annotated[bool, typer.Option("--resume", help="Resume from the last checkpoint.")]),
    ("dry_run", False, Annotated[bool, typer.Option("--dry-run", help="Print all settings as a recipe and exit.")]),
    ("settings", False, Annotated[bool, typer.Option("--settings", help="List all settings and exit.")]),
)
