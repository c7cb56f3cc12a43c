"""How this process's memory is handed back to the system while it trains on a CPU."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""glibc's `malloc.h`."""


def keep_freed_memory() -> None:
    """Keep what is freed for the next step, where the C library is glibc; elsewhere nothing happens.

    A step takes and frees the same activations over and over. glibc gives blocks of megabytes back to the system at
    once, so every step has them mapped and zeroed again, page by page. The peak stays what it was; between steps the
    process holds on to it.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
