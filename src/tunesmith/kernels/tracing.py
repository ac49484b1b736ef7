"""Whether something around a call has to see each of its operations, so that several must not be one."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Whether `torch.func`, forward-mode gradients or tracing by `torch.jit` are at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or torch.jit.is_tracing()


def is_tracing() -> bool:
    """Whether one of these is, or `torch.compile`."""
    return is_transformed() or torch.compiler.is_compiling()
