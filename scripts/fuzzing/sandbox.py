"""One command in a process of its own, with limits: a fork of this one, which has torch imported already, or the real command."""

from __future__ import annotations

import faulthandler
import os
import resource
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[2]
CPU_SECONDS = 40  # of one input, which takes about one; a machine that is busy elsewhere does not count
WALL_SECONDS = 240
MEMORY_BYTES = 4 << 30  # beyond what this process has mapped
FILE_BYTES = 512 << 20
SHOWN_BYTES = 200_000  # of what a command said
HUNG = -1000  # the code of a command that was ended


@dataclass(frozen=True)
class Result:
    """How a command ended. ``code``: its exit code, negative for a signal, ``HUNG`` for one that took too long."""

    code: int
    out: str
    err: str

    @property
    def hung(self) -> bool:
        return self.code == HUNG


def warm_up() -> None:
    """Import what runs import, so that a fork has it: all of it but for what starts threads or looks for devices."""
    import transformers.models.gpt2.modeling_gpt2
    import transformers.models.llama.modeling_llama  # noqa: F401

    import pretrain.cli.main
    import pretrain.launch.launcher
    import pretrain.run.tasks
    import pretrain.training.trainer  # noqa: F401

    for module in (
        "data.tokenization.workers",
        "data.reading.cut",
        "data.loader",
        "data.evaluation",
        "data.sources.local",
        "evaluation.samples",
    ):
        __import__(f"pretrain.{module}")
    for module in (
        "optim.adamw",
        "optim.schedule",
        "strategy.single",
        "training.exporter",
        "models.hub.model_card",
        "models.meta",
        "run.metadata",
    ):
        __import__(f"pretrain.{module}")
    for module in (
        "evaluation.perplexity",
        "checkpoint.writer",
        "models.flops",
        "telemetry.monitor",
        "training.guard.guard",
    ):
        __import__(f"pretrain.{module}")
    __import__("pyarrow.parquet")


def command(arguments: list[str], place: Path, *, real: bool = False) -> Result:
    """``python -m pretrain <arguments>`` in the folder ``place``, which gets its token cache and what it says."""
    environment = {"PRETRAIN_CACHE": str(place / "cache"), "HF_HUB_OFFLINE": "1", "HOME": str(place / "home")}
    environment |= {"HF_HOME": str(place / "home/hf"), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment |= {"TOKENIZERS_PARALLELISM": "false", "COLUMNS": "100"}
    (place / "home").mkdir(exist_ok=True)
    if real:
        return _real(arguments, place, environment)

    def work() -> int:
        from pretrain.cli.main import main

        os.environ.update(environment)
        os.chdir(place)
        sys.argv = ["pretrain", *arguments]
        main(list(arguments))

    return forked(work, place)


def forked(work: Callable[[], int | None], place: Path) -> Result:
    """``work`` in a fork of this process; what it prints goes to files in ``place``."""
    out, err = place / ".out", place / ".err"
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if not child:
        _be_the_child(work, out, err)
    code = _wait(child)
    return Result(code, _read(out), _read(err))


def _be_the_child(work: Callable[[], int | None], out: Path, err: Path) -> NoReturn:
    code: object = 1
    try:
        os.setsid()
        for descriptor, path in ((1, out), (2, err)):
            opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(opened, descriptor)
            os.close(opened)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(n), "w", buffering=1, errors="replace") for n in (1, 2))
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        faulthandler.enable(2)
        faulthandler.register(signal.SIGXCPU, file=2, all_threads=True, chain=False)
        limit(CPU_SECONDS)
        code = work()
    except SystemExit as left:
        code = left.code
    except BaseException:
        os.write(2, traceback.format_exc().encode(errors="replace"))  # sys.stderr may be a thread's by now
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def limit(cpu_seconds: int) -> None:
    """Of this process: memory, files, and time on the CPU, after which SIGXCPU shows its stacks and SIGKILL ends it."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    resource.setrlimit(resource.RLIMIT_CPU, (int(used) + cpu_seconds, int(used) + cpu_seconds + 2))


def _wait(child: int) -> int:
    """The exit code of ``child``, of which nothing is left when this returns."""
    handle = os.pidfd_open(child)
    try:
        late = not select.select([handle], [], [], WALL_SECONDS)[0]
        if late:
            os.kill(child, signal.SIGXCPU)  # its stacks
            time.sleep(1)
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    except BaseException:
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(child, 0)
        raise
    finally:
        os.close(handle)
    code = os.waitstatus_to_exitcode(status)
    return HUNG if late or code == -signal.SIGKILL else code


def _real(arguments: list[str], place: Path, environment: dict[str, str]) -> Result:
    words = [sys.executable, "-m", "pretrain", *arguments]
    given = os.environ | environment | {"PYTHONPATH": str(ROOT)}
    with (place / ".out").open("wb") as out, (place / ".err").open("wb") as err:
        process = subprocess.Popen(
            words, cwd=place, env=given, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
        )
        try:
            code = process.wait(WALL_SECONDS)
        except subprocess.TimeoutExpired:
            code = HUNG
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Result(code, _read(place / ".out"), _read(place / ".err"))


def _read(file: Path) -> str:
    with file.open("rb") as stream:
        return stream.read(SHOWN_BYTES).decode("utf-8", "replace")
