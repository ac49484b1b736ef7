"""`tunesmith merge`: an adapter into its base's weights, as a plain model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .merged import write_merged
from .options import Base


def merge(
    adapter: Annotated[Path, typer.Option(help="Adapter folder or Hub id.")],
    output_dir: Annotated[Path, typer.Option(help="New folder for the model.")],
    base: Base = None,
) -> None:
    """Merge an adapter into its base and save a plain model. The result runs without Tunesmith.

    \b
    Example:
      tunesmith merge --adapter my-adapter --output-dir merged
    """
    write_merged(adapter, output_dir, base)
