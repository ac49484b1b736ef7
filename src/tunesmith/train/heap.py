"""What glibc's heap keeps of freed memory while a base in 4 or 8 bits trains on a CPU.

By itself the heap has as many arenas as there are threads, and the gaps in all of them stay with the process: a training that
needed 1.5 GB at a time came to hold 2.6 GB (benchmarks/cases/qlora.py). With one arena, and the largest blocks given back when
freed, it holds 1.6 GB. Giving back smaller ones saves little more, and each takes fresh pages the next time.
"""

from __future__ import annotations

import ctypes

ARENA_MAX, MMAP_THRESHOLD = -8, -3  # of <malloc.h>
GIVEN_BACK = 31 * 2**20  # bytes; glibc allows no more than 32 MB


def leave_no_gaps() -> bool:
    """Tell this process's heap; whether it listens (glibc's does, others have no such settings)."""
    try:
        settings = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(settings(ARENA_MAX, 1) and settings(MMAP_THRESHOLD, GIVEN_BACK))
