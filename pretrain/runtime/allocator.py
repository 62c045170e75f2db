"""Settings of the C library's memory allocator for training on a CPU.

glibc returns every freed block of more than some 32 MiB to the kernel, which fills it with zeros when it is used again, page by
page. In a training step these are logits and gradients of the embedding, the same sizes again and again: a fifth of the
processor time of a step of a small model with 49,152 words was spent so.
Source: https://man7.org/linux/man-pages/man3/mallopt.3.html
"""

from __future__ import annotations

import os

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
LARGEST_KEPT = 2**30  # bytes of the largest block that is kept
OWN_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES")


def keep_freed_memory() -> None:
    """Make this process keep the memory it frees for its next allocations. It does nothing without glibc, or if the environment
    has settings of glibc's allocator."""
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or any(name in os.environ for name in OWN_SETTINGS):
        return
    mallopt(MMAP_THRESHOLD, LARGEST_KEPT)
    mallopt(TRIM_THRESHOLD, -1)  # never
