"""The command line: verbs, and errors as one sentence with an exit code."""

from __future__ import annotations

import logging
import sys
from typing import Any

import typer

from .. import __version__
from ..errors import ConfigError, DataError, DivergedError, InterruptedRun, OutOfMemoryError, TunesmithError
from ..jobs.processes import check_alone
from . import (
    chat,
    demo,
    doctor,
    evaluate,
    export,
    generate,
    inspect,
    merge,
    methods,
    plan,
    push,
    quantize,
    sweep,
    train,
    validate,
)

EXIT_CODES: dict[type[BaseException], int] = {
    DataError: 3,
    ConfigError: 2,
    OutOfMemoryError: 4,
    DivergedError: 5,
    InterruptedRun: 130,
    TunesmithError: 1,
}
EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="tunesmith",
    help="One frozen base model, any number of small adapters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"max_content_width": 110},
    rich_markup_mode=None,  # plain help: a screen holds it, and rich is not imported for it
)
COMMANDS: dict[str, Any] = {
    "validate": validate.validate,
    "plan": plan.plan,
    "train": train.train,
    "sweep": sweep.sweep,
    "eval": evaluate.evaluate,
    "generate": generate.generate,
    "chat": chat.chat,
    "merge": merge.merge,
    "export": export.export,
    "quantize": quantize.quantize,
    "inspect": inspect.inspect,
    "push": push.push,
    "methods": methods.methods,
    "doctor": doctor.doctor,
    "demo": demo.demo,
}
for verb, command in COMMANDS.items():
    app.command(verb)(command)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tunesmith {__version__}")
        raise typer.Exit()


# Commands that several processes may run: they share the work out, or write nothing.
IN_PROCESSES = {"train", "validate", "plan", "inspect", "methods", "doctor"}


@app.callback()
def _options(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
) -> None:
    if context.invoked_subcommand not in IN_PROCESSES:
        check_alone(str(context.invoked_subcommand))


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. Exit codes: 0 success, 1 failure, 2 usage or configuration, 3 data, 4 out of memory,
    5 diverged, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it logs missing kernels when it is imported
    try:
        app([_with_dashes(argument) for argument in arguments])
    except TunesmithError as error:
        _stop(error, next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind)))
    except KeyboardInterrupt:
        _stop("interrupted", EXIT_INTERRUPTED)


def _with_dashes(argument: str) -> str:
    """Flags may be written with `_` or `-`."""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else argument


def _stop(error: object, code: int) -> None:
    typer.secho(f"error: {error}", fg="red", err=True)
    sys.exit(code)
