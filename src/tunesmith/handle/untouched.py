"""The check that training through a handle leaves its base as it is; part of the check of the first step."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import UsageError, bullet_list

logger = logging.getLogger(__name__)
SHOWN = 5


def tell_of_trained(base: nn.Module) -> None:
    """Warn of parameters of the base that require gradients: training would change what all handles share and no file keeps."""
    trained = [name for name, parameter in base.named_parameters() if parameter.requires_grad]
    if trained:
        logger.warning(
            "%d parameters of the base require gradients (%s%s): an optimizer that holds them changes the base for all its "
            "handles, and no adapter file will hold them; modules_to_save trains private copies instead",
            len(trained), ", ".join(trained[:SHOWN]), ", ..." if len(trained) > SHOWN else "",
        )  # fmt: skip


@contextmanager
def same_buffers(base: nn.Module) -> Iterator[None]:
    """Inside, a call in training mode may not change buffers that a checkpoint of the base would hold.

    Raises:
        UsageError: it did; the buffers have their values again.
    """
    before = {name: (buffer, buffer._version, buffer.clone()) for name, buffer in _kept(base) if not buffer.is_inference()}
    yield
    changed = [name for name, (buffer, version, _) in before.items() if buffer._version != version]
    if changed:
        with torch.no_grad():
            for name in changed:
                buffer, _, value = before[name]
                buffer.copy_(value)
        raise UsageError(
            "the base's own modules changed these buffers in a training step, and a base is never changed; name the modules "
            "that hold them in modules_to_save, which trains and saves private copies:\n" + bullet_list(changed)
        )


def _kept(base: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, module in base.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, buffer
