"""Where a command computes: on the machine's accelerator if there is one."""

from __future__ import annotations

from typing import Any


def to_accelerator(model: Any) -> Any:
    """The model, moved to this process's accelerator; left where it is without one, or if it was loaded in parts."""
    import torch

    if not torch.accelerator.is_available() or hasattr(model, "hf_device_map"):
        return model
    return model.to(torch.accelerator.current_accelerator())
