"""A run in several processes (`torchrun`): each computes on its share of a batch, one writes, and all agree when to stop."""

from __future__ import annotations

import math
import os

from ..errors import UsageError


def count() -> int:
    """How many processes the launcher has started."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    return int(os.environ.get("RANK") or 0) == 0


def check_alone(command: str) -> None:
    """Refuse what is not made for several processes.

    Raises:
        UsageError: a launcher has started several.
    """
    if count() > 1:
        raise UsageError(
            f"tunesmith {command} runs in one process, but the launcher has started {count()} (WORLD_SIZE); run it without "
            "torchrun (tunesmith train runs under it)"
        )


def connect() -> None:
    """Connect the processes of this run, so that the Trainer will share batches out between them; does nothing with one.

    Raises:
        UsageError: they cannot be connected, so each would run the whole training into the same folder.
    """
    if count() == 1:
        return
    import torch
    from accelerate import PartialState

    try:
        connected = PartialState(cpu=not torch.accelerator.is_available()).num_processes
    except (RuntimeError, ValueError, KeyError) as error:  # torch: no address or port, a device too few
        raise UsageError(f"WORLD_SIZE is {count()}, but the processes cannot be connected: {error}; use torchrun") from error
    if connected != count():
        raise UsageError(
            f"WORLD_SIZE is {count()}, but only {connected} process(es) are connected; start them all with "
            f"torchrun --nproc-per-node {count()}, or unset WORLD_SIZE"
        )


def wait() -> None:
    """Until all processes are here."""
    if count() > 1:
        import torch.distributed as dist

        dist.barrier()


def agreed(value: float) -> float:
    """The largest of the processes' values, so that all decide alike; infinite where one is not a number."""
    if count() == 1:
        return value
    import torch
    import torch.distributed as dist

    value = math.inf if math.isnan(value) else value  # the maximum with one that is none is not defined

    device = torch.accelerator.current_accelerator() if dist.get_backend() == "nccl" else "cpu"
    shared = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return shared.item()
