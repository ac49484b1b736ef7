"""`tunesmith merge`: an adapter into its base's weights, as a plain model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .generate import Base


def merge(
    adapter: Annotated[Path, typer.Option(help="Adapter folder or hub id.")],
    output_dir: Annotated[Path, typer.Option(help="A new folder for the model.")],
    base: Base = None,
) -> None:
    """Write base and adapter as one plain model, which needs no Tunesmith to run.

    \b
    Example:
      tunesmith merge --adapter my-adapter --output-dir merged
    """
    from ..data.files import check_new_folder

    check_new_folder(output_dir)
    import torch
    from rich.console import Console

    from ..jobs import merged_folder, quiet
    from ..jobs.generator import Generator

    quiet.hush()
    console = Console(highlight=False, soft_wrap=True)
    speaker = Generator(str(adapter), base)
    text = "A text to compare both models on."
    ids = torch.tensor([speaker.tokenizer(text)["input_ids"]], device=speaker.base.device)
    with torch.no_grad():
        before = speaker.model(input_ids=ids).logits.float()
        plain = speaker.model.merge_and_unload()
        after = plain(input_ids=ids).logits.float()
    size = merged_folder.write(plain, speaker.tokenizer, output_dir)
    console.print(f"merged: {output_dir} ({size / 1e6:.1f} MB, {plain.dtype})")
    console.print(f"largest difference to base and adapter: {(after - before).abs().max():.2g} in logits of up to "
                  f"{before.abs().max():.3g} (rounding to {plain.dtype})")  # fmt: skip
