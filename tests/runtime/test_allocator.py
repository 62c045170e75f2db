"""Memory that is freed and allocated again is not filled with zeros by the kernel again."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from pretrain.runtime.allocator import OWN_SETTINGS

TWICE = """
import ctypes, resource, sys
from pretrain.runtime.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
c = ctypes.CDLL(None)
c.malloc.restype = ctypes.c_void_p
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = ctypes.c_void_p(c.malloc(ctypes.c_size_t(2**26)))
    ctypes.memset(block, 1, 2**26)
    c.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str, **environment: str) -> int:
    """The page faults of 64 MiB that are allocated and written for the second time."""
    own = {key: value for key, value in os.environ.items() if key not in OWN_SETTINGS} | environment
    return int(subprocess.run([sys.executable, "-c", TWICE, how], env=own, check=True, capture_output=True).stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_freed_memory_is_used_again() -> None:
    assert faults("kept") < 100
    assert faults("as it is") > 1000
    assert faults("kept", MALLOC_MMAP_THRESHOLD_="131072") > 1000, "the user's own setting"
