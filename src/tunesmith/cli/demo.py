"""`tunesmith demo`: one frozen base, two specialists."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    method: Annotated[str, typer.Option(help="prompt-tuning or lora.")] = "prompt-tuning",
    output_dir: Annotated[Path, typer.Option(help="Folder for the adapters and the plot.")] = Path("demo-out"),
    num_train_epochs: Annotated[float, typer.Option("--num-train-epochs", "--epochs", help="Passes over the data.")] = 6,
    seed: Annotated[int, typer.Option(help="Random seed: held-out rows, initial values, row order.")] = 0,
) -> None:
    """Train two adapters on the built-in base, and compare them. One writes prompts, the other quotes.

    \b
    Example:
      tunesmith demo --method lora
    """
    from ..jobs import demo as story

    story.tell(method, output_dir, num_train_epochs, seed)
