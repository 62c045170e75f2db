"""Available and used host memory of this process, read from the kernel's files.

Where these files do not exist (macOS) the results are ``None``; then only a failed allocation shows that memory ran out.
"""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
V1, V2 = ("memory.limit_in_bytes", "memory.usage_in_bytes"), ("memory.max", "memory.current")


def available_bytes() -> int | None:
    """Return the available host memory: the minimum of MemAvailable and what the cgroups' limits and RLIMIT_AS leave."""
    limits = list(cgroup_bytes())
    machine = read_kib(Path("/proc/meminfo"), "MemAvailable")
    if machine is not None:
        limits.append(machine)
    limit, size = resource.getrlimit(resource.RLIMIT_AS)[0], read_kib(Path("/proc/self/status"), "VmSize")
    if limit != resource.RLIM_INFINITY and size is not None:
        limits.append(limit - size)
    return max(0, min(limits)) if limits else None


def cgroup_bytes(own: Path = Path("/proc/self/cgroup"), root: Path = CGROUPS) -> Iterator[int]:
    """Yield what each cgroup (version 1 or 2) of this process leaves of its limit; nothing for a cgroup without a limit."""
    for line in own.read_text().splitlines() if own.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top, names = (root / controllers, V1) if controllers else (root, V2)
        inside = top / path.lstrip("/")
        for folder in (inside, *inside.parents):
            with suppress(OSError, ValueError):  # no such file here, or "max"
                limit, used = (int((folder / name).read_text()) for name in names)
                yield limit - used
            if folder == top:
                break


def resident_bytes() -> int | None:
    """Return the resident memory of this process."""
    return read_kib(Path("/proc/self/status"), "VmRSS")


def peak_bytes() -> int | None:
    """Return the peak resident memory since ``reset_peak``, or since the process started if the kernel can't reset it."""
    return read_kib(Path("/proc/self/status"), "VmHWM")


def reset_peak() -> None:
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def read_kib(file: Path, name: str) -> int | None:
    """Return the bytes in a line such as ``VmSize:  640256 kB`` of one of the kernel's files."""
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB$", file.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def gib(number: float) -> str:
    """Format a number of bytes, such as ``"3.1 GiB"`` or ``"310 MiB"``."""
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"
