"""Optimisers by the names that `TrainingArguments(optim=...)` knows, where a device or a package for them is missing.

A paged optimiser moves its states between a GPU's memory and the CPU's; on a CPU there is nowhere to move them, and what is
left is the optimiser of the same arithmetic that does not page. Without bitsandbytes, AdamW in 32 bits is torch's.
"""

from __future__ import annotations

import importlib.util
import logging

from ..errors import ConfigError, did_you_mean

logger = logging.getLogger(__name__)

# name -> the one of the same arithmetic that does not page
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
    """Whether transformers knows an optimiser of that name.

    Raises:
        ConfigError: it does not.
    """
    from transformers.training_args import OptimizerNames

    known = [optimizer.value for optimizer in OptimizerNames]
    if name not in known:
        near = did_you_mean(name, known)
        raise ConfigError(f'optim "{name}" is unknown{near}; use adamw_torch, paged_adamw_32bit or another of transformers\' names')


def usable_optimizer(name: str, device: str) -> str:
    """`name`, or what stands in for it on this machine, which is said.

    Args:
        device: a type of device, "cpu" or "cuda".

    Raises:
        ConfigError: the optimiser needs bitsandbytes, and nothing can stand in for it.
    """
    if name not in OF_BITSANDBYTES:
        return name
    if importlib.util.find_spec("bitsandbytes") is None:
        if name not in OF_TORCH:
            raise ConfigError(f'optim="{name}" needs bitsandbytes; pip install "tunesmith[quant]", or take optim="adamw_torch"')
        logger.warning(
            'optim="%s" needs bitsandbytes, which is not installed; going on with "%s", whose states are 32 bits wide',
            name, OF_TORCH[name],
        )  # fmt: skip
        return OF_TORCH[name]
    if device == "cpu" and name in UNPAGED:
        logger.warning(
            'optim="%s" pages its states out of a GPU\'s memory, and this is a CPU; going on with "%s", which does not page',
            name, UNPAGED[name],
        )  # fmt: skip
        return UNPAGED[name]
    return name
