"""A merged model written to a folder and compared with what it was made of: what `merge` and `export --to merged` do."""

from __future__ import annotations

from pathlib import Path

from .options import load_generator
from .output import console


def write_merged(adapter: Path, output_dir: Path, base: str | None) -> None:
    """Merge an adapter into its base and write a plain model; prints its size and how far its logits are off.

    Raises:
        ConfigError: the folder already exists or cannot be written to.
        TunesmithError: the adapter cannot be loaded or merged.
    """
    from ..data.files import check_new_folder

    check_new_folder(output_dir)
    import torch

    from ..jobs import merged_folder, quiet

    quiet.hush()
    generator = load_generator(adapter, base, template=None, load_in_4bit=False)
    ids = torch.tensor([generator.tokenizer("Any text shows the difference.")["input_ids"]], device=generator.base.device)
    with torch.no_grad():
        before = generator.model(input_ids=ids).logits.float()
        plain = generator.model.merge_and_unload()
        after = plain(input_ids=ids).logits.float()
    size = merged_folder.write(plain, generator.tokenizer, output_dir)
    out = console()
    out.print(f"merged: {output_dir} ({size / 1e6:.1f} MB, {plain.dtype})")
    out.print(
        f"largest difference from base plus adapter: {(after - before).abs().max():.2g}, with logits up to "
        f"{before.abs().max():.3g} (rounded to {plain.dtype})"
    )
