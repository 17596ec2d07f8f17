"""How the C library's allocator handles freed memory."""

import ctypes

# Parameters of mallopt(3), from glibc's <malloc.h>.
TRIM_THRESHOLD, MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Have this process reuse the memory that it frees, rather than return it to the kernel; glibc only.

    Left alone, glibc returns large blocks as soon as they are freed. Then every training step on a CPU gets its
    activations and gradients as new pages, which the kernel has to clear first. The peak of the memory in use stays
    about the same, but what is free after it is not given back.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(MMAP_MAX, 0)
        libc.mallopt(TRIM_THRESHOLD, -1)
