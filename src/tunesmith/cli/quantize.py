"""`tunesmith quantize`: a 4-bit checkpoint of a base model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError


def quantize(
    model: Annotated[str, typer.Argument(help='"sprout", a folder written by save_pretrained, or a hub id.')],
    output: Annotated[Path, typer.Argument(help="The folder to write; must be new or empty.")],
    quant_type: Annotated[str, typer.Option(help="nf4 or fp4.")] = "nf4",
    double_quant: Annotated[bool, typer.Option(help="Quantise the scales, too.")] = True,
    compute_dtype: Annotated[str, typer.Option(help="The type that loaded modules compute in.")] = "bfloat16",
) -> None:
    """Write a base model in 4 bits, shard by shard: it may be larger than memory.

    Example: tunesmith quantize sprout sprout-4bit
    """
    if quant_type not in ("nf4", "fp4") or compute_dtype not in ("bfloat16", "float16", "float32"):
        raise ConfigError("--quant-type is nf4 or fp4, --compute-dtype bfloat16, float16 or float32")
    from ..auto import base_folder
    from ..bases.quantise import quantise_folder

    done = quantise_folder(
        base_folder(model), output, quant_type=quant_type, double_quant=double_quant, compute_dtype=compute_dtype
    )
    typer.echo(
        f"{output}: {done['modules']} modules in 4 bits, {done['before'] / 1e6:,.1f} MB -> {done['after'] / 1e6:,.1f} MB"
    )
