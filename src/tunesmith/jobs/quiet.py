"""Silences other libraries, so that a command's output is the command's own."""

from __future__ import annotations

import logging
import warnings
from typing import Any


def hush() -> None:
    """Silence progress bars, advice and warnings of transformers and the Hub; errors stay."""
    for name in ("accelerate", "bitsandbytes", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)  # before they are imported, which is when bitsandbytes logs
    from transformers import logging as transformers_logging

    say_less: Any = transformers_logging  # untyped
    say_less.set_verbosity_error()
    say_less.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
