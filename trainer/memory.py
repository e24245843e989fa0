"""How the C library keeps freed memory, which decides how fast large networks run on a CPU."""

import contextlib
import ctypes

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> None:
    """Keep glibc from handing pages back between layers: page faults were half of the vision encoder's time."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for parameter in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD, _M_TOP_PAD):
            libc.mallopt(parameter, 256 * 1024 * 1024)
