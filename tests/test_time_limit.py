"""A test that hangs is ended, with every process that it has started; the tests after it run."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.time_limit import SLOW_SECONDS

ROOT = Path(__file__).parents[1]
HANGS = """
import subprocess, sys, time
from pathlib import Path

SLEEPER = "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], "
SLEEPER += "start_new_session=True); print(p.pid, flush=True); time.sleep(600)"


def test_hangs(request):
    parent = subprocess.Popen([sys.executable, "-c", SLEEPER], stdout=subprocess.PIPE, text=True)
    child = parent.stdout.readline().strip()
    Path("pids").write_text(f"{parent.pid} {child}")
    parent.kill()  # its child is an orphan of a session of its own, as of a launcher that was killed
    parent.wait()
    left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path("pids").write_text(f"{left.pid} {child}")
    time.sleep(600)


def test_after_it():
    pass
"""


def test_a_hanging_test_ends_with_its_processes(tmp_path):
    (tmp_path / "test_hangs.py").write_text(HANGS)
    (tmp_path / "pytest.ini").write_text("[pytest]\ntimeout = 3\n")
    words = [sys.executable, "-m", "pytest", "-p", "tests.time_limit", "-p", "no:cacheprovider", "test_hangs.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert "Timeout (>3.0s)" in done.stdout
    assert "1 failed, 1 passed" in done.stdout
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 60
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
        assert time.monotonic() < deadline, "both are gone"
        time.sleep(0.05)
    for pid in pids:
        assert f"pid {pid}" in done.stdout


def test_of_this_suite(request):
    """By pyproject.toml, not by a marker of its own."""
    assert float(request.config.getini("timeout")) == 600
    assert request.node.get_closest_marker("timeout") is None


@pytest.mark.slow
def test_of_the_slow_suite(request):
    assert request.node.get_closest_marker("timeout").args == (SLOW_SECONDS,)
