"""How much memory this process has used, and how much work it has done."""

import ctypes
import os
import resource
import sys

# Tensors from this size on go back to the system as soon as they are dropped; smaller ones, such
# as slices of a layer, are worth keeping for the next one.
_LARGE_BYTES = 1 << 22
# What the allocator holds of smaller ones at any time: free room at its end, and gaps.
GAPS_BYTES = 4 * _LARGE_BYTES
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def peak_bytes() -> int:
    """The most memory this process has held at once."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int:
    """The memory this process holds now; where the system does not say, the most it held."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_bytes()


def settle() -> None:
    """Have memory given back that is not used, from now on, where the C library can.

    By itself glibc keeps ever larger holes: what a layer took would stay with the process.
    """
    library = ctypes.CDLL(None)
    for name, arguments in (
        ("mallopt", (_M_MMAP_THRESHOLD, _LARGE_BYTES)),
        ("mallopt", (_M_TRIM_THRESHOLD, 2 * _LARGE_BYTES)),
        ("malloc_trim", (0,)),
    ):
        if (function := getattr(library, name, None)) is not None:
            function(*arguments)


def cpu_seconds() -> float:
    """Processor time of this process, over all its threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
