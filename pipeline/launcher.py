"""Settings of the process that must be made before torch is there: they change speed and memory, never a result.

- Threads of torch that wait for each other spin. Beside any other work the waiting one then takes the core from the one
  that it waits for; `GOMP_SPINCOUNT` lets it give up soon. Without other work it costs nothing.
- The C allocator gives large blocks back to the system after each use and gets them anew, page by page, filled with
  zeros. A training step asks for the same blocks again and again, so it keeps them. Large pages where the system
  offers them.

An environment of your own wins.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # mallopt's numbers for its options, from glibc's malloc.h


def settle() -> None:
    """Make the settings; called once, before anything imports torch."""
    assert "torch" not in sys.modules
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if sys.platform == "linux" and not any(name.startswith("MALLOC_") for name in os.environ):
        with contextlib.suppress(OSError, AttributeError):  # a C library that is not glibc
            libc = ctypes.CDLL(None)
            libc.mallopt(M_MMAP_MAX, 0)
            libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
