"""How the C library keeps freed memory, which decides how fast large networks run on a CPU.

What is kept breaks into pieces, and a request may fit into none: over days of streaming it grew by 6 MiB a day,
with the same amount in use. So it is given back now and then. Another C library than glibc is left alone.
"""

import contextlib
import ctypes

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> None:
    """Keep glibc from handing pages back between layers: page faults were half of the vision encoder's time."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for parameter in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD, _M_TOP_PAD):
            libc.mallopt(parameter, 256 * 1024 * 1024)


def give_back_freed_memory() -> None:
    """Hand back all pages that hold nothing now. What is needed of them again costs its page faults once."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
