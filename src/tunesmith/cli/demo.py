"""`tunesmith demo`: one frozen base, two specialists."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    method: Annotated[str, typer.Option(help="prompt-tuning or lora.")] = "prompt-tuning",
    output_dir: Annotated[Path, typer.Option(help="Where adapters and the picture go.")] = Path("demo-out"),
    num_train_epochs: Annotated[float, typer.Option("--num-train-epochs", "--epochs", help="Passes over the data.")] = 6,
    seed: Annotated[int, typer.Option(help="Decides the held-out rows, start values and order of rows.")] = 0,
) -> None:
    """Adapt the embedded base model into a prompt writer and a quote writer, side by side.

    Example: tunesmith demo --method lora
    """
    from ..jobs import demo as story

    story.tell(method, output_dir, num_train_epochs, seed)
