"""What glibc's heap keeps of freed memory while a base in 4 or 8 bits trains on a CPU.

By itself the heap takes blocks of up to 32 MB, in as many arenas as there are threads, and gaps between them stay with the
process: a training that needed 1.5 GB at a time came to hold 2.6 GB (benchmarks/cases/qlora.py). With one arena, and blocks
of 16 MB and more given back when freed, it holds 1.5 GB.
"""

from __future__ import annotations

import ctypes

ARENA_MAX, MMAP_THRESHOLD = -8, -3  # of <malloc.h>
GIVEN_BACK = 16 * 2**20


def leave_no_gaps() -> bool:
    """Tell this process's heap; whether it listens (glibc's does, others have no such settings)."""
    try:
        settings = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(settings(ARENA_MAX, 1) and settings(MMAP_THRESHOLD, GIVEN_BACK))
