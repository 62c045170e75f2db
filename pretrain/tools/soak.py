"""Inject faults into small runs at random moments until the time is over. Nothing that was saved may be lost, and each run
must in the end equal the undisturbed run bit for bit.

    python -m pretrain.tools.soak --minutes 30 [--seed 0] [--folder DIR]

The runs train a tiny Llama with dropout on the embedded sample text, alternately in one process and in two with strategy=ddp.
At a random moment (of starting, training, evaluating, saving or exporting) a fault is injected, and the same command starts
the run again. A finished run is compared with the undisturbed run, and the next one starts. As root on Linux the run folder
is on a small disk of its own (tmpfs), which is also filled up and made read-only; otherwise these two faults are omitted.

faults: by kind · resumes: starts that resumed from a checkpoint · lost steps: steps in a complete checkpoint from which the
next start did not resume · wrong steps: records or tensors that differ in the end.

Ctrl-C and SIGTERM end it early, with the results so far. Exit code 0: nothing lost, nothing wrong.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pretrain.telemetry.sinks.jsonl import read_records
from pretrain.tools.arguments import tool_parser
from pretrain.tools.verify_resume import compare, kill, make, newest_checkpoint, started

Process = subprocess.Popen[bytes]
LLAMA = "model_type:llama,hidden_size:64,intermediate_size:128,num_hidden_layers:2,num_attention_heads:2"
LLAMA += ",num_key_value_heads:2,max_position_embeddings:128,attention_dropout:0.1"
RUN = ["model=scratch", f"model.overrides={{{LLAMA}}}", "sequence_length=64", "batch_size=2", "max_steps=240"]
RUN += ["save_every=12", "evaluate_every=60", "evaluation.max_tokens=2000", "checkpoint.verify=full"]
RUN += ["checkpoint.keep_last=3"]
KINDS = {"single": ["batch_size=2"], "ddp": ["strategy=ddp", "devices=2", "batch_size=1"]}
DISK_MIB = 96
STOPPED = 75


class Lost(Exception):
    """A run ended in a way that must not happen."""


# -- faults: each takes the process and its run folder, and returns when the process has ended ----------------------------


def members(process: Process) -> list[int]:
    """Return the ids of all processes of the run, which are those of its session."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if os.getsid(int(entry.name)) == process.pid:
                found.append(int(entry.name))
    return found


def kill_all(process: Process, run: Path) -> None:
    kill(process)


def kill_one(process: Process, run: Path) -> None:
    with suppress(ProcessLookupError):
        os.kill(random.choice(members(process) or [process.pid]), signal.SIGKILL)
    process.wait()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def ask(number: signal.Signals, *, all_of_them: bool) -> Callable[[Process, Path], None]:
    def send(process: Process, run: Path) -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number) if all_of_them else os.kill(process.pid, number)
        process.wait()

    return send


def pause(process: Process, run: Path) -> None:
    """Suspend all processes of the run for a moment, then kill them."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGSTOP)
        time.sleep(1)
        os.killpg(process.pid, signal.SIGCONT)
        time.sleep(0.5)
    kill(process)


def damage(change: Callable[[Path], None]) -> Callable[[Process, Path], None]:
    """Kill the run, then change a file of its newest checkpoint."""

    def act(process: Process, run: Path) -> None:
        kill(process)
        newest = newest_checkpoint(run)
        if newest is not None:
            change(random.choice(sorted(newest.iterdir())))

    return act


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    file.write_bytes(content)


def tear_records(process: Process, run: Path) -> None:
    kill(process)
    metrics = run / "metrics.jsonl"
    if metrics.exists() and metrics.stat().st_size:
        os.truncate(metrics, metrics.stat().st_size - random.randint(1, 20))


def fill_disk(process: Process, run: Path) -> None:
    """Fill the disk for some seconds; a run that has not ended by then is killed."""
    with suppress(OSError), (run.parent / "ballast").open("wb") as ballast:
        while True:
            ballast.write(bytes(1 << 20))
    _give(process, seconds=4)
    (run.parent / "ballast").unlink()


def read_only(process: Process, run: Path) -> None:
    mount("-o", "remount,ro", str(run.parent), force=True)
    _give(process, seconds=4)
    mount("-o", "remount,rw", str(run.parent))


def _give(process: Process, *, seconds: float) -> None:
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    if process.poll() is None:
        kill(process)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


FAULTS: dict[str, Callable[[Process, Path], None]] = {
    "SIGKILL of all": kill_all,
    "SIGKILL of one": kill_one,
    "SIGTERM": ask(signal.SIGTERM, all_of_them=False),
    "SIGUSR1": ask(signal.SIGUSR1, all_of_them=False),
    "Ctrl-C": ask(signal.SIGINT, all_of_them=True),
    "pause, then SIGKILL": pause,
    "torn checkpoint": damage(truncate),
    "flipped bit": damage(flip),
    "lost file": damage(Path.unlink),
    "torn metrics.jsonl": tear_records,
}
OF_A_DISK = {"full disk": fill_disk, "read-only disk": read_only}


def ran_whole(run: Path, began_at: float) -> bool:
    """Return whether the start at ``began_at`` made the run from its first step to its last. A finished run that is started
    again ends at once."""
    starts = [r for r in read_records(run / "metrics.jsonl") if r["event"] == "run_started"]
    return len(starts) == 1 and not starts[0]["resumed"] and starts[0]["time"] >= began_at


def newest_step(run: Path) -> int:
    """Return the step of the newest complete checkpoint, as the next start reads it; 0 without one."""
    from pretrain.checkpoint.config import CheckpointConfig
    from pretrain.checkpoint.store import CheckpointStore

    newest = CheckpointStore(run / "checkpoints", CheckpointConfig(verify="full")).newest()
    return int(newest.name.removeprefix("step-")) if newest else 0


def mount(*arguments: str, force: bool = False) -> bool:
    """Run mount(8) and return whether it succeeded. With ``force`` it is repeated while a process writes."""
    for _ in range(200 if force else 1):
        if subprocess.run(["mount", *arguments], capture_output=True).returncode == 0:
            return True
        time.sleep(0.01)
    return False


@contextmanager
def disk(folder: Path) -> Iterator[bool]:
    """Mount a small disk at ``folder``, and yield whether that is possible here."""
    folder.mkdir(parents=True)
    mounted = hasattr(os, "geteuid") and os.geteuid() == 0
    mounted = mounted and mount("-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(folder))
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=False)


# -- the soak -------------------------------------------------------------------------------------------------------------


class Soak:
    """The runs of a soak and their results so far.

    ``scratch`` is the folder of the undisturbed runs, ``place`` the disk of the others.
    """

    def __init__(self, scratch: Path, place: Path, *, with_disk: bool) -> None:
        self.scratch, self.place = scratch, place
        self.possible = FAULTS | (OF_A_DISK if with_disk else {})
        self.faults: Counter[str] = Counter()
        self.moments: Counter[str] = Counter()
        self.resumes = self.finished = self.lost_steps = self.wrong_steps = 0
        self.seconds: dict[str, float] = {}
        self.log = scratch / "log"

    def reference(self, kind: str) -> Path:
        """Return the undisturbed run, which is made by the first call."""
        run = self.scratch / kind
        if not run.exists():
            began_at = time.monotonic()
            make([*RUN, *KINDS[kind]], run, self.log)
            self.seconds[kind] = time.monotonic() - began_at  # the shortest so far: the machine may have been busy
        return run

    def disturb_until_finished(self, kind: str, until: float) -> None:
        """Make one run from its beginning to its end, with faults in between. It is abandoned when the time is over."""
        reference, run = self.reference(kind), self.place / "run"
        saved = 0  # the step from which the next start must resume
        while time.monotonic() < until:
            began_at = time.time()
            with started([*RUN, *KINDS[kind]], run, self.log) as process:
                if self.disturb(process, run, kind):
                    self.check_start(run, saved, began_at)
                    saved = newest_step(run)
                    continue
            if ran_whole(run, began_at):
                self.seconds[kind] = min(self.seconds[kind], time.time() - began_at)
            self.check_start(run, saved, began_at)
            self.check_end(run, reference)
            break
        shutil.rmtree(run, ignore_errors=True)

    def disturb(self, process: Process, run: Path, kind: str) -> bool:
        """Inject a fault at a random moment. Return False if the run has finished before."""
        with suppress(subprocess.TimeoutExpired):
            process.wait(random.uniform(0.2, 1.0) * self.seconds[kind])
        if process.returncode is None:
            self.fault(process, run)
            return True
        if process.returncode:
            raise Lost(f"{kind}: ended with exit code {process.returncode} without a fault")
        return False

    def fault(self, process: Process, run: Path) -> None:
        """Inject a fault."""
        name = random.choice(sorted(self.possible))
        self.moments[self.moment(run)] += 1
        self.possible[name](process, run)
        self.faults[name] += 1
        code = process.returncode
        if name in ("SIGTERM", "SIGUSR1") and code not in (0, STOPPED, -signal.SIGTERM, -signal.SIGUSR1):
            raise Lost(f"{name}: exit code {code}")

    def moment(self, run: Path) -> str:
        """Return what the run was doing, by what it has written last."""
        if not (run / "metrics.jsonl").exists():
            return "first start"
        if list((run / "checkpoints").glob("*.partial")):
            return "saving"
        if list(run.glob("model*.partial")):
            return "exporting"
        with suppress(ValueError, IndexError, FileNotFoundError):
            return f"after a {read_records(run / 'metrics.jsonl')[-1]['event']} record"
        return "other"

    def check_start(self, run: Path, saved: int, began_at: float) -> None:
        """Check that the start at ``began_at`` resumed from the newest complete checkpoint, if it came so far."""
        starts = [r for r in self.records(run) if r["event"] == "run_started" and r["time"] >= began_at]
        if not starts:
            return
        self.resumes += starts[-1]["resumed"]
        if starts[-1]["step"] < saved:
            self.lost_steps += saved - starts[-1]["step"]
            print(f"LOST: resumed from {starts[-1]['step']}, {saved} was saved", flush=True)

    @staticmethod
    def records(run: Path) -> list[dict[str, Any]]:
        path = run / "metrics.jsonl"
        return read_records(path) if path.exists() else []

    def check_end(self, run: Path, reference: Path) -> None:
        """Count the records and tensors in which a finished run differs from the undisturbed one."""
        from safetensors.torch import load_file

        self.finished += 1
        wrong = [f"{n}: {d.largest:g} {d.where}" for n, d in compare(run, reference).items() if d.largest]
        ours, theirs = (load_file(r / "model" / "model.safetensors") for r in (run, reference))
        wrong += [f"model/: {n}" for n in theirs if n not in ours or not ours[n].equal(theirs[n])]
        self.wrong_steps += len(wrong)
        for line in wrong:
            print(f"WRONG: {line}", flush=True)

    def summary(self) -> str:
        """Return the results so far, in three lines."""
        kinds = ", ".join(f"{count} × {name}" for name, count in sorted(self.faults.items()))
        moments = ", ".join(f"{count} {name}" for name, count in sorted(self.moments.items()))
        return (
            f"faults: {self.faults.total()} ({kinds})\nmoments: {moments}\n"
            f"resumes: {self.resumes} · runs finished and compared: {self.finished} · "
            f"lost steps: {self.lost_steps} · wrong steps: {self.wrong_steps}"
        )


def main() -> None:
    parser = tool_parser("soak", __doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0, help="seed of the faults")
    parser.add_argument("--folder", type=Path, help="for the runs; a new folder in it is used (default: TMPDIR)")
    asked = parser.parse_args()
    random.seed(asked.seed)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    until = time.monotonic() + asked.minutes * 60
    with tempfile.TemporaryDirectory(prefix="soak-", dir=asked.folder) as folder:
        with disk(Path(folder, "disk")) as with_disk:
            if not with_disk:
                print("no disk of its own (only root on Linux can mount one): without full and read-only disks")
            soak = Soak(Path(folder), Path(folder, "disk"), with_disk=with_disk)
            try:
                while time.monotonic() < until:
                    for kind in KINDS:
                        soak.disturb_until_finished(kind, until)
                        print(soak.summary().splitlines()[-1], f"· faults: {soak.faults.total()}", flush=True)
            except Lost as error:
                print(f"FAILED: {error}\n" + "\n".join(soak.log.read_text(errors="replace").splitlines()[-15:]))
                soak.wrong_steps += 1
            except KeyboardInterrupt:
                print("stopped")
        print(soak.summary())
    sys.exit(1 if soak.lost_steps or soak.wrong_steps else 0)


if __name__ == "__main__":
    main()
