"""A time limit for every test: pytest-timeout ends the test, and here every process that it has started is killed with it.

`timeout` in pyproject.toml is for tests of the default suite, ``SLOW_SECONDS`` for those marked slow, slurm or gpu: both many
times what a test takes, because a loaded machine of two cores is slow. ``@pytest.mark.timeout(seconds)`` sets another.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import psutil
import pytest

SLOW_SECONDS = 3600
SESSION = "PRETRAIN_TEST_SESSION"  # inherited by whatever a test starts, also by what leaves its session or its parent
LAST_WORDS = "Timeout (>"  # of pytest-timeout's failure


def pytest_configure() -> None:
    os.environ[SESSION] = f"{os.getpid()}-{time.time_ns()}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        is_slow = any(item.get_closest_marker(name) for name in ("slow", "slurm", "gpu"))
        if is_slow and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(SLOW_SECONDS))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Iterator[None]:  # a generator: what it returns is the report
    report = yield
    if call.excinfo is not None and str(call.excinfo.value).startswith(LAST_WORDS):
        names = ", ".join(process_names(kill_started_by(item.nodeid)))
        report.sections.append(("time limit", f"killed: {names or 'nothing, no process was left'}"))
    return report


def kill_started_by(node: str) -> list[psutil.Process]:
    """Kill every process that the test ``node`` of this session has started, and wait until it is gone."""
    found = [process for process in psutil.process_iter() if _is_of(process, node)]
    for process in found:
        process.kill()
    psutil.wait_procs(found, timeout=10)
    return found


def _is_of(process: psutil.Process, node: str) -> bool:
    if process.pid == os.getpid():
        return False
    try:
        environment = process.environ()
    except psutil.Error:  # gone, or another user's
        return False
    return environment.get(SESSION) == os.environ[SESSION] and environment.get("PYTEST_CURRENT_TEST", "").startswith(
        f"{node} ("
    )


def process_names(processes: list[psutil.Process]) -> list[str]:
    """How a report names them; of one that is gone only the number is left."""
    return [f"pid {process.pid}" for process in processes]
