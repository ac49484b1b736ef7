"""`tunesmith train`: a data file to an adapter. Its flags are the fields of `Settings`."""

from __future__ import annotations

import inspect
import os
import types
import typing
from pathlib import Path
from typing import Annotated, Any

import typer

from ..jobs.recipe import FIELDS, NOTHING_TO_SET, OLD_NAMES, RECIPE_FILE, SYNONYMS, TYPES, resolve
from ..jobs.settings import Settings

HELP = """Train an adapter on your own data.

\b
Examples:
  tunesmith train --data prompts.csv --text-column prompt --output-dir my-adapter
  tunesmith train --data alpaca.json --method lora --learning-rate 1e-3
  tunesmith train recipe.yaml --learning-rate 1e-4    flags win over the recipe
  tunesmith train --resume --output-dir my-adapter    goes on after an interruption

Settings come from the recipe, then TUNESMITH_... variables, then flags. All of them: --settings.
"""


def train(recipe: Path | None, resume: bool, dry_run: bool, settings: bool, **flags: Any) -> None:
    if settings:
        return _list_settings()
    given = {name: value for name, value in flags.items() if value not in (None, [])}
    recorded = Path(flags.get("output_dir") or Settings.output_dir) / RECIPE_FILE
    if resume and recipe is None and recorded.is_file():
        recipe = recorded
    resolved = resolve(recipe, os.environ, given)
    for warning in resolved.warnings:
        typer.secho(f"warning: {warning}", fg="yellow", err=True)
    values = resolved.values
    if recipe is not None and recipe == recorded:
        values["output_dir"] = str(recorded.parent)
    if dry_run:
        from ..jobs.recipe import as_yaml

        typer.echo(as_yaml(Settings(**values)), nl=False)
        return None
    from ..jobs import run

    run.from_values(values, resume)
    return None


def read_options(pairs: list[str]) -> dict[str, Any]:
    """`["r=16", "use_dora=true"]` as a dictionary; values are JSON, or else plain text.

    Raises:
        ConfigError: a pair has no `=`, or a name comes twice.
    """
    return resolve(None, {}, {"options": pairs}).values["options"]


def _list_settings() -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("setting", "default", "what it is"):
        table.add_column(column, no_wrap=column != "what it is")
    for name, field in FIELDS.items():
        default: Any = {} if callable(field.default_factory) else field.default
        table.add_row(name, str(default), field.metadata["help"])
    Console(highlight=False, markup=False).print(table)


def _flags() -> list[inspect.Parameter]:
    """A flag for each setting, and hidden ones for the names that other tools have for them."""

    def flag(name: str, annotation: Any, spelling: str, help: str = "", shown: bool = True) -> inspect.Parameter:
        option = typer.Option(spelling, help=help, hidden=not shown, show_default=False)
        return inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[annotation | None, option]
        )

    found = []
    for name, field in FIELDS.items():
        spelling = f"--{name.replace('_', '-')}"
        hint = TYPES[name]
        optional = typing.get_origin(hint) in (typing.Union, types.UnionType)
        kind = next(option for option in typing.get_args(hint) if option is not type(None)) if optional else hint
        if kind is bool:
            spelling += f"/--no-{spelling[2:]}"
        if typing.get_origin(kind) is dict:
            kind = list[str]
        elif kind is not bool:
            kind = str  # one reader of numbers for recipes, the environment and flags
        default = "" if field.default in (None, "") or callable(field.default_factory) else f" [{field.default}]"
        help = field.metadata["help"] + default
        found.append(flag(name, kind, spelling, help=help, shown=field.metadata["shown"]))
    for other in {**SYNONYMS, **OLD_NAMES, **NOTHING_TO_SET}:
        kind = list[str] if SYNONYMS.get(other) == "options" else str
        found.append(flag(other, kind, f"--{other.replace('_', '-')}", shown=False))
    return found


def give_signature(command: Any, help: str, *own: tuple[str, Any, Any]) -> None:
    """Typer reads a command's flags from its signature: a recipe, its `own` (name, default, type), and every setting."""
    recipe = Annotated[Path | None, typer.Argument(help="A yaml file of settings.", show_default=False)]
    parameters = [
        inspect.Parameter("recipe", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=recipe),
        *[inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=d, annotation=kind) for n, d, kind in own],
        *_flags(),
    ]
    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__doc__ = help


give_signature(
    train,
    HELP,
    ("resume", False, Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")]),
    ("dry_run", False, Annotated[bool, typer.Option("--dry-run", help="Print every setting as a recipe, and stop.")]),
    ("settings", False, Annotated[bool, typer.Option("--settings", help="List every setting, and stop.")]),
)
