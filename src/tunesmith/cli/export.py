"""`tunesmith export`: an adapter for other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError, did_you_mean
from .merged import write_merged
from .options import DTYPES, Base

FORMS = ("peft", "merged")


def export(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder or Hub id.")],
    output_dir: Annotated[Path, typer.Option(help="New folder for the files.")],
    to: Annotated[str, typer.Option(help="peft: adapter files. merged: a plain model.")] = "peft",
    dtype: Annotated[str | None, typer.Option(help=f"{', '.join(DTYPES)}; default: unchanged.", show_default=False)] = None,
    base: Base = None,
) -> None:
    """Export an adapter for other tools. Writes files that PEFT reads, in a dtype of your choice, or a merged model.

    \b
    Examples:
      tunesmith export my-adapter --output-dir for-peft --dtype float16
      tunesmith export my-adapter --output-dir plain-model --to merged

    Tokenizer, template and run records are not exported; old .bin files become safetensors.
    """
    if to not in FORMS:
        raise ConfigError(f'--to "{to}" is unknown{did_you_mean(to, FORMS)}; use {" or ".join(FORMS)}')
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f'dtype "{dtype}" is unknown{did_you_mean(dtype, DTYPES)}; use {", ".join(DTYPES)}')
    if to == "merged":
        if dtype is not None:
            raise ConfigError("a merged model keeps its base's dtype; leave --dtype out")
        write_merged(adapter, output_dir, base)
        return
    if base is not None:
        raise ConfigError("--base applies only to --to merged; adapter files name their base themselves")
    from ..data.files import check_new_folder

    check_new_folder(output_dir)
    import torch

    from ..checkpoint.export import export_adapter

    size = export_adapter(str(adapter), output_dir, getattr(torch, dtype) if dtype else None)
    typer.echo(f"exported: {output_dir} ({size / 1024:.1f} KB of tensors)")
