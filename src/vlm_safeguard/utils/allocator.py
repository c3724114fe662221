"""Has the C library keep memory that is freed.

A model on a CPU allocates buffers of many megabytes in every layer. glibc gives such buffers back
to the system and asks for them again, page by page; in any thread but the first it does so with
every one above 32 MB. That can take a quarter of the time of a batch.
"""

from __future__ import annotations

import ctypes

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Take all memory from one heap, and give none back before the process ends.

    Call it before other threads allocate anything. Memory stays at its highest level from then on.

    Returns:
        Whether the C library can do that.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1))
    return all(mallopt(name, value) == 1 for name, value in settings)
