"""`tunesmith export`: an adapter for other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError, did_you_mean
from .generate import Base

FORMS = {"peft": "a folder that peft and the servers which read its files take", "merged": "a plain model, as tunesmith merge"}
DTYPES = ("float32", "bfloat16", "float16")


def export(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder or hub id.")],
    output_dir: Annotated[Path, typer.Option(help="A new folder.")],
    to: Annotated[str, typer.Option(help="peft: adapter files. merged: a plain model.")] = "peft",
    dtype: Annotated[str | None, typer.Option(help=f"{', '.join(DTYPES)}; default: as it is.", show_default=False)] = None,
    base: Base = None,
) -> None:
    """Write an adapter as other tools read it: in one number type, or merged into its base.

    \b
    Examples:
      tunesmith export my-adapter --output-dir for-peft --dtype float16
      tunesmith export my-adapter --output-dir plain-model --to merged

    Tokenizer, template and records of the run stay behind; old .bin files become safetensors.
    """
    if to not in FORMS:
        raise ConfigError(f'--to "{to}" is unknown{did_you_mean(to, FORMS)}; use {" or ".join(FORMS)}')
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f'dtype "{dtype}" is unknown{did_you_mean(dtype, DTYPES)}; use {", ".join(DTYPES)}')
    if to == "merged":
        if dtype is not None:
            raise ConfigError("a merged model keeps its base's number type; leave --dtype out")
        from .merge import merge

        merge(adapter, output_dir, base)
        return
    if base is not None:
        raise ConfigError("--base is for --to merged; adapter files name their base themselves")
    from ..data.files import check_new_folder

    check_new_folder(output_dir)
    import torch

    from ..checkpoint.export import export_adapter

    size = export_adapter(str(adapter), output_dir, getattr(torch, dtype) if dtype else None)
    typer.echo(f"exported: {output_dir} ({size / 1024:.1f} KB of tensors)")
