"""Writes a merged model into a folder, completely or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ..errors import UsageError


def write(model: Any, tokenizer: Any, folder: Path) -> int:
    """Write model and tokenizer next to `folder` and rename; returns the size in bytes.

    Raises:
        UsageError: the disk is full or not writable; nothing is left behind.
    """
    staging = folder.with_name(f".{folder.name}-staging")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        if folder.is_dir():
            folder.rmdir()  # empty
        staging.rename(folder)
    except Exception as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise UsageError(
            f"the merged model cannot be written to {folder} ({error}); free some space or choose another folder"
        ) from error
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
