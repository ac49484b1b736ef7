"""Other libraries' chatter, off: what a person sees in a command is what the command says."""

from __future__ import annotations

import logging
import warnings


def hush() -> None:
    """Silence progress bars, advice and warnings of transformers and the hub; errors stay."""
    for name in ("accelerate", "bitsandbytes", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)  # before they are imported, which is when bitsandbytes speaks
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
