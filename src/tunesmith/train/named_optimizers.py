"""Optimisers named by `TrainingArguments(optim=...)` for which this machine lacks the device or the package.

A paged optimiser moves its states between GPU and CPU memory. On a CPU there is nowhere to move them, so the optimiser of the
same arithmetic that does not page replaces it. Without bitsandbytes, torch's own AdamW with 32-bit states does.
"""

from __future__ import annotations

import importlib.util
import logging

from ..errors import ConfigError, did_you_mean

logger = logging.getLogger(__name__)

# name -> the optimiser of the same arithmetic that does not page
UNPAGED = {
    "paged_adamw_32bit": "adamw_torch",
    "paged_adamw_8bit": "adamw_bnb_8bit",
    "paged_lion_32bit": "lion_32bit",
    "paged_lion_8bit": "lion_8bit",
    "paged_ademamix_32bit": "ademamix",
    "paged_ademamix_8bit": "ademamix_8bit",
}
OF_BITSANDBYTES = {
    *UNPAGED, "adamw_bnb_8bit", "adamw_8bit", "lion_32bit", "lion_8bit", "ademamix", "ademamix_8bit", "rmsprop_bnb",
    "rmsprop_bnb_8bit", "rmsprop_bnb_32bit",
}  # fmt: skip
OF_TORCH = {"paged_adamw_32bit": "adamw_torch", "paged_adamw_8bit": "adamw_torch", "adamw_bnb_8bit": "adamw_torch",
            "adamw_8bit": "adamw_torch"}  # fmt: skip


def check_optimizer(name: str) -> None:
    """Check that transformers knows an optimiser of that name.

    Raises:
        ConfigError: it does not.
    """
    from transformers.training_args import OptimizerNames

    known = [optimizer.value for optimizer in OptimizerNames]
    if name not in known:
        near = did_you_mean(name, known)
        raise ConfigError(
            f'optim "{name}" is unknown{near}; use adamw_torch, paged_adamw_32bit or another optimiser of transformers'
        )


def usable_optimizer(name: str, device: str) -> str:
    """`name`, or what replaces it on this machine, with a warning.

    Args:
        device: a type of device, "cpu" or "cuda".

    Raises:
        ConfigError: the optimiser needs bitsandbytes, and nothing can replace it.
    """
    if name not in OF_BITSANDBYTES:
        return name
    if importlib.util.find_spec("bitsandbytes") is None:
        if name not in OF_TORCH:
            raise ConfigError(f'optim="{name}" needs bitsandbytes; pip install "tunesmith[quant]", or use optim="adamw_torch"')
        logger.warning(
            'optim="%s" needs bitsandbytes, which is not installed; using "%s" instead, whose states take 32 bits',
            name, OF_TORCH[name],
        )  # fmt: skip
        return OF_TORCH[name]
    if device == "cpu" and name in UNPAGED:
        logger.warning(
            'optim="%s" pages its states out of GPU memory, and this is a CPU; using "%s" instead, which does not page',
            name, UNPAGED[name],
        )  # fmt: skip
        return UNPAGED[name]
    return name
