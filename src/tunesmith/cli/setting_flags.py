"""A flag for each field of `Settings`, as `train` and `plan` take them."""

from __future__ import annotations

import inspect
import os
import types
import typing
from pathlib import Path
from typing import Annotated, Any

import typer

from ..jobs.recipe import FIELDS, NOTHING_TO_SET, OLD_NAMES, SYNONYMS, TYPES, resolve
from .output import warn


def give_signature(command: Any, help: str, *own: tuple[str, Any, Any]) -> None:
    """Typer reads a command's flags from its signature: a recipe, its `own` (name, default, type), and every setting."""
    recipe = Annotated[Path | None, typer.Argument(help="YAML file with settings.", show_default=False)]
    parameters = [
        inspect.Parameter("recipe", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=recipe),
        *[inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=d, annotation=kind) for n, d, kind in own],
        *_setting_flags(),
    ]
    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__doc__ = help


def resolve_settings(recipe: Path | None, flags: dict[str, Any]) -> dict[str, Any]:
    """Values for `Settings` from a recipe, the environment and flags; prints the warnings about them.

    Raises:
        ConfigError: all unknown names and wrong values at once.
    """
    resolved = resolve(recipe, os.environ, {name: value for name, value in flags.items() if value not in (None, [])})
    for warning in resolved.warnings:
        warn(warning)
    return resolved.values


def _setting_flags() -> list[inspect.Parameter]:
    """A flag for each setting, and hidden ones for the names that other tools have for them."""
    flags = []
    for name, field in FIELDS.items():
        spelling = f"--{name.replace('_', '-')}"
        kind = _flag_type(TYPES[name])
        if kind is bool:
            spelling += f"/--no-{spelling[2:]}"
        default = "" if field.default in (None, "") or callable(field.default_factory) else f" [{field.default}]"
        flags.append(_flag(name, kind, spelling, help=field.metadata["help"] + default, shown=field.metadata["shown"]))
    for other in {**SYNONYMS, **OLD_NAMES, **NOTHING_TO_SET}:
        kind = list[str] if SYNONYMS.get(other) == "options" else str
        flags.append(_flag(other, kind, f"--{other.replace('_', '-')}", shown=False))
    return flags


def _flag_type(hint: Any) -> Any:
    """What Typer converts a flag to. Numbers stay text, so that recipes, environment and flags have one reader of numbers."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(option for option in typing.get_args(hint) if option is not type(None))
    if typing.get_origin(hint) is dict:
        return list[str]
    return bool if hint is bool else str


def _flag(name: str, kind: Any, spelling: str, help: str = "", shown: bool = True) -> inspect.Parameter:
    option = typer.Option(spelling, help=help, hidden=not shown, show_default=False)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option])
