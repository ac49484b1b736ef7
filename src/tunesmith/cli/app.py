"""The command line: verbs, and errors as one sentence with an exit code."""

from __future__ import annotations

import sys

import typer

from .. import __version__
from ..errors import ConfigError, DataError, TunesmithError
from . import demo, generate, methods, quantize, train

EXIT_FAILED, EXIT_USAGE, EXIT_DATA, EXIT_INTERRUPTED = 1, 2, 3, 130

app = typer.Typer(
    name="tunesmith",
    help="One frozen base model, any number of small adapters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("demo")(demo.demo)
app.command("train")(train.train)
app.command("generate")(generate.generate)
app.command("methods")(methods.methods)
app.command("quantize")(quantize.quantize)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tunesmith {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. Exit codes: 0 ok, 1 failed, 2 usage or configuration, 3 data, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        app([_with_dashes(argument) for argument in arguments])
    except DataError as error:
        _stop(error, EXIT_DATA)
    except ConfigError as error:
        _stop(error, EXIT_USAGE)
    except TunesmithError as error:
        _stop(error, EXIT_FAILED)
    except KeyboardInterrupt:
        _stop("interrupted", EXIT_INTERRUPTED)


def _with_dashes(argument: str) -> str:
    """Flags may be written with `_` or `-`."""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else argument


def _stop(error: object, code: int) -> None:
    typer.secho(f"error: {error}", fg="red", err=True)
    sys.exit(code)
