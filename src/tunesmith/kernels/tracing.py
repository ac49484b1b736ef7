"""Whether something around a call has to see each of its operations, so that they must not be fused."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def is_tracing() -> bool:
    """Whether `torch.func`, forward-mode gradients or tracing by `torch.jit` or `torch.compile` is active."""
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    return transformed or torch.jit.is_tracing() or torch.compiler.is_compiling()
