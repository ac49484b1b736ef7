"""How much freed memory glibc's heap keeps while a 4-bit or 8-bit base trains on a CPU.

By default the heap has as many arenas as there are threads, and the gaps in all of them stay with the process: a training run
that needed 1.5 GB at a time ended up holding 2.6 GB (benchmarks/cases/qlora.py). With one arena, and with the largest blocks
returned to the system when freed, it holds 1.6 GB. Returning smaller blocks saves little more, and each costs fresh pages the
next time.
"""

from __future__ import annotations

import ctypes

ARENA_MAX, MMAP_THRESHOLD = -8, -3  # of <malloc.h>
RETURNED = 31 * 2**20  # bytes; glibc allows no more than 32 MB


def leave_no_gaps() -> bool:
    """Configure this process's heap; returns whether it obeys (glibc's does, others have no such settings)."""
    try:
        settings = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(settings(ARENA_MAX, 1) and settings(MMAP_THRESHOLD, RETURNED))
