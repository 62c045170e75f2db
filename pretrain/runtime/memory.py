"""How much memory of the host this process may still take, and how much it has taken: from the kernel's own files.

Where there are none (macOS) the answers are ``None``; a failed allocation is then the first to tell.
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
    """The least of what the machine, the cgroups around this process and ``ulimit -v`` leave."""
    limits = list(cgroup_bytes())
    machine = read_kib(Path("/proc/meminfo"), "MemAvailable")
    if machine is not None:
        limits.append(machine)
    limit, size = resource.getrlimit(resource.RLIMIT_AS)[0], read_kib(Path("/proc/self/status"), "VmSize")
    if limit != resource.RLIM_INFINITY and size is not None:
        limits.append(limit - size)
    return max(0, min(limits)) if limits else None


def cgroup_bytes(own: Path = Path("/proc/self/cgroup"), root: Path = CGROUPS) -> Iterator[int]:
    """What each cgroup around this process leaves of its limit, of version 1 or 2; nothing for one without a limit."""
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
    """What this process has in memory now."""
    return read_kib(Path("/proc/self/status"), "VmRSS")


def peak_bytes() -> int | None:
    """The most it has had in memory since ``reset_peak``, or since it began where the kernel keeps no shorter account."""
    return read_kib(Path("/proc/self/status"), "VmHWM")


def reset_peak() -> None:
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def read_kib(file: Path, name: str) -> int | None:
    """The bytes of a line such as ``VmSize:  640256 kB`` of a file of the kernel's."""
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB$", file.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def gib(number: float) -> str:
    """``"3.1 GiB"``, ``"310 MiB"``."""
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"
