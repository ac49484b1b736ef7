"""`tunesmith quantize`: a 4-bit checkpoint of a base model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from .options import DTYPES

QUANT_TYPES = ("nf4", "fp4")


def quantize(
    model: Annotated[str, typer.Argument(help='"sprout", a folder written by save_pretrained, or a Hub id.')],
    output: Annotated[Path, typer.Argument(help="New or empty folder for the 4-bit model.")],
    quant_type: Annotated[str, typer.Option(help="nf4 or fp4.")] = "nf4",
    double_quant: Annotated[bool, typer.Option(help="Also quantise the scales.")] = True,
    compute_dtype: Annotated[str, typer.Option(help="The dtype that the loaded model computes in.")] = "bfloat16",
) -> None:
    """Convert a base model to 4 bits. It is read shard by shard, so it may be larger than memory.

    \b
    Example:
      tunesmith quantize sprout sprout-4bit
    """
    if quant_type not in QUANT_TYPES or compute_dtype not in DTYPES:
        raise ConfigError(f"--quant-type must be {' or '.join(QUANT_TYPES)}, and --compute-dtype one of {', '.join(DTYPES)}")
    from ..auto import base_folder
    from ..bases.quantise import quantise_folder

    done = quantise_folder(
        base_folder(model), output, quant_type=quant_type, double_quant=double_quant, compute_dtype=compute_dtype
    )
    typer.echo(
        f"{output}: {done['modules']} modules in 4 bits, {done['before'] / 1e6:,.1f} MB -> {done['after'] / 1e6:,.1f} MB"
    )
