"""Workers that this program starts: clean ends, whatever happens to one of them; restarts; and joining those of others."""

import json
import os
import shutil
import signal
import time
from contextlib import suppress
from itertools import product
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from pretrain.telemetry.run_file import read_run_file
from pretrain.telemetry.sinks.jsonl import read_records
from pretrain.training.micro_batching import MicroBatching
from tests.preloaded import run_preloaded
from tests.runs import starts

LONG = ["max_steps=100000", "evaluate_every=null", "save_every=10", "sink=jsonl"]
PAIR = ["strategy=ddp", "devices=2", "batch_size=1"]


@pytest.fixture
def long_run(base_arguments, spawn, tmp_path):
    """A run of two workers that is in the middle of its work: (process, workers, folder)."""

    def start(*more, until=15):
        run = tmp_path / "run"
        process = spawn([*base_arguments, *LONG, *PAIR, f"output_dir={run}", *more])
        wait_for(lambda: steps(run) >= until, process)
        return process, workers_of(process.pid), run

    return start


def steps(run: Path) -> int:
    path = run / "metrics.jsonl"
    return max((r["step"] for r in read_records(path)), default=0) if path.exists() else 0


def wait_for(condition, process, seconds=90) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until, "it takes too long"
        time.sleep(0.02)


def workers_of(pid: int) -> list[psutil.Process]:
    """The forked workers, by rank: children of the fork server, in the order in which they were started."""
    grandchildren = [c for child in psutil.Process(pid).children() for c in child.children()]
    return sorted(grandchildren, key=lambda process: (process.create_time(), process.pid))


def ended(process, workers, seconds=60) -> str:
    """What the run printed, once it and its workers are gone."""
    out, _ = process.communicate(timeout=seconds)
    _gone, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive, "no orphans"
    return out


DDP = pytest.param("strategy=ddp", 0, marks=pytest.mark.slow)
DEEPSPEED = pytest.param("strategy=deepspeed strategy.zero_stage=3", 1, marks=pytest.mark.slow)


@pytest.mark.parametrize(("strategy", "rank"), [("strategy=fsdp", 1), DDP, DEEPSPEED])
def test_a_rank_that_is_killed_takes_the_group_down(strategy, rank, long_run):
    process, workers, run = long_run(*strategy.split())
    workers[rank].kill()
    out = ended(process, workers)
    assert process.returncode == 1
    assert f"rank {rank} was killed by SIGKILL" in out
    assert f"logs/rank-{rank}.log" in out
    assert "Traceback" not in out, "the others' broken connection is not the cause"
    assert read_run_file(run)["status"] == "failed"


@pytest.mark.parametrize(
    ("strategy", "number", "everyone"),
    [
        ("strategy=fsdp", signal.SIGTERM, True),  # as a scheduler sends it, or `timeout`
        ("strategy=ddp", signal.SIGINT, True),  # as a terminal sends Ctrl-C
        pytest.param("strategy=ddp", signal.SIGUSR1, False, marks=pytest.mark.slow),
        pytest.param("strategy=ddp", signal.SIGTERM, False, marks=pytest.mark.slow),
        pytest.param("strategy=ddp", signal.SIGUSR1, True, marks=pytest.mark.slow),
        pytest.param("strategy=deepspeed strategy.zero_stage=3", signal.SIGTERM, False, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_exits_75(strategy, number, everyone, long_run, base_arguments, command):
    """To the command alone, or to all that belongs to it: the fork server and Python's own helper, too."""
    process, workers, run = long_run(*strategy.split())
    others = psutil.Process(process.pid).children(recursive=True) if everyone else []
    for one in (*others, process):
        one.send_signal(number)
    out = ended(process, workers)
    assert process.returncode == 75, out
    assert out.count("finishing this step, then saving") == 1
    facts = read_run_file(run)
    assert facts["status"] == "stopped"
    assert (run / f"checkpoints/step-{facts['steps']:08d}/COMPLETE.json").exists()
    more = ["evaluate_every=null", "sink=jsonl", f"max_steps={facts['steps'] + 2}"]
    code, _, err = command([*base_arguments, *PAIR, *strategy.split(), f"output_dir={run}", *more])
    assert code == 0, err
    assert steps(run) == facts["steps"] + 2


@pytest.mark.parametrize(
    ("delay", "number"),
    [
        (1.5, signal.SIGTERM),
        (2.5, signal.SIGINT),
        *(
            pytest.param(*both, marks=pytest.mark.slow)
            for both in product((1.0, 2.0, 3.0), (signal.SIGTERM, signal.SIGINT))
        ),
    ],
)
def test_a_signal_while_it_starts(delay, number, base_arguments, spawn, tmp_path):
    """In the middle of imports, preparing the data, starting workers, building models: the end is as clean. Ctrl-C reaches
    all of them."""
    process = spawn([*base_arguments, *LONG, *PAIR, f"output_dir={tmp_path}"], start_new_session=True, fresh=True)
    time.sleep(delay)
    everyone = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    out = ended(process, everyone)
    assert process.returncode == 75, out
    assert "Traceback" not in out


def test_a_second_ctrl_c_leaves_at_once(long_run):
    process, workers, run = long_run("gradient_accumulation_steps=400", until=1)  # steps of several seconds
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)  # the same one, twice, as some wrappers send it
    time.sleep(1.1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out = ended(process, workers)
    assert process.returncode == 130, out
    assert read_run_file(run)["status"] == "failed"


@pytest.mark.slow
def test_a_second_command_leaves_a_live_run_alone(long_run, base_arguments, command):
    process, _, run = long_run()
    code, _, err = command([*base_arguments, *LONG, *PAIR, f"output_dir={run}"])
    assert code == 2, err
    assert "another run is using it" in err
    assert process.poll() is None
    assert read_run_file(run)["status"] == "running"


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.1, 0.5, 1.0, 2.0])
def test_a_stop_during_a_restart_is_heard(delay, long_run):
    process, workers, _ = long_run("launch.max_restarts=3")
    workers[1].kill()
    time.sleep(delay)
    process.send_signal(signal.SIGTERM)
    out = ended(process, workers)
    assert process.returncode == 75, out
    assert "Traceback" not in out


def test_a_parent_that_is_killed_leaves_no_orphans(long_run, base_arguments, command):
    process, workers, run = long_run()
    process.kill()
    ended(process, workers)
    more = ["evaluate_every=null", "sink=jsonl", "max_steps=30"]
    code, _, err = command([*base_arguments, *PAIR, f"output_dir={run}", *more])
    assert code == 0, err


BREAK = """
import torch
step = torch.optim.AdamW.step
def broken(self, *given, **more):
    import os
    from pathlib import Path
    os.write(2, ("rank %s speaks\\n" % os.environ.get("RANK")).encode())
    mark = Path({mark!r})
    count = int(mark.read_text()) if mark.exists() else 0
    if os.environ.get("RANK") == "1" and self.state and max(float(s["step"]) for s in self.state.values()) == {at}:
        if count < {times}:
            mark.write_text(str(count + 1))
            raise RuntimeError("broken on purpose")
    return step(self, *given, **more)
torch.optim.AdamW.step = broken
"""


def broken_run(arguments, tmp_path, *, at, times):
    """The program with an optimizer that raises on rank 1 at update ``at``, the first ``times`` times. The fork server
    imports it with everything else. However it ends, nothing of it is left behind."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "break_it.py").write_text(BREAK.format(mark=str(tmp_path / "mark"), at=at, times=times))
    start = (
        "from pretrain.launch import agent\n"
        "import multiprocessing\n"
        "def warm_up():\n"
        "    preload = ['pretrain.launch.preload', 'break_it']\n"
        "    multiprocessing.get_context('forkserver').set_forkserver_preload(preload)\n"
        "    multiprocessing.forkserver.ensure_running()\n"
        "agent.warm_up = warm_up\n"
        "from pretrain.cli.main import program\nprogram()\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{site}{os.pathsep}{Path(__file__).parents[2]}"}
    done = run_preloaded(["-c", start, *arguments], env=environment, timeout=120)
    assert not left_behind(environment["PYTHONPATH"])
    return done


def left_behind(python_path: str) -> list[psutil.Process]:
    """The processes that were started with this PYTHONPATH and do not end."""
    left = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("PYTHONPATH") == python_path:
                left.append(process)
    return psutil.wait_procs(left, timeout=10)[1]


def test_an_exception_on_one_rank_is_told_once(base_arguments, tmp_path):
    run = tmp_path / "run"
    done = broken_run([*base_arguments, *PAIR, f"output_dir={run}", "sink=jsonl"], tmp_path, at=7, times=9)
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("Traceback") == 1
    assert done.stderr.count("RuntimeError: broken on purpose") == 1
    assert f"rank 1 failed; see {run}/logs/rank-1.log" in done.stderr
    assert "broken on purpose" in (run / "logs/rank-1.log").read_text()
    assert read_run_file(run)["status"] == "failed"


def test_a_restart_goes_on_from_the_last_checkpoint(base_arguments, command, tmp_path, exact_model):
    """Twice it dies at the same update; the third attempt ends where an undisturbed run ends, bit for bit."""
    model = f"model_name={exact_model('llama')}"
    given = [*base_arguments, model, *PAIR, "sink=jsonl", "save_every=5"]
    run = tmp_path / "run"
    restarts = [f"output_dir={run}", "launch.max_restarts=2"]
    done = broken_run([*given, *restarts], tmp_path, at=7, times=2)
    assert done.returncode == 0, done.stderr
    assert "rank 1 failed: RuntimeError: broken on purpose" in done.stderr
    assert "(restart 1 of 2)" in done.stderr
    assert "(restart 2 of 2)" in done.stderr
    facts = read_run_file(run)
    assert (facts["status"], facts["steps"], facts["restarts"]) == ("finished", 20, 2)
    assert starts(run) == [(0, False), (5, True), (5, True)]
    code, _, err = command([*given, f"output_dir={tmp_path / 'undisturbed'}"])
    assert code == 0, err
    losses = [
        [(r["step"], r["loss"]) for r in read_records(folder / "metrics.jsonl") if r["event"] == "train"]
        for folder in (run, tmp_path / "undisturbed")
    ]
    assert losses[0] == losses[1]
    ours, theirs = (load_file(folder / "model/model.safetensors") for folder in (run, tmp_path / "undisturbed"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
@pytest.mark.parametrize("resume", ["never", "named"])
def test_what_resume_says_is_done_once(resume, base_arguments, command, tmp_path):
    """Not again after a restart: then the run's own newest checkpoint counts."""
    earlier, run = tmp_path / "earlier", tmp_path / "run"
    if resume == "never":
        run = earlier
    code, _, err = command([*base_arguments, f"output_dir={earlier}", "max_steps=2", "sink=jsonl"])
    assert code == 0, err
    named = "never" if resume == "never" else earlier / "checkpoints/step-00000002"
    more = [f"output_dir={run}", f"resume={named}", "launch.max_restarts=1", "max_steps=10", "sink=jsonl"]
    done = broken_run([*base_arguments, *PAIR, *more], tmp_path, at=7, times=1)
    assert done.returncode == 0, done.stderr
    assert "(restart 1 of 1)" in done.stderr
    assert starts(run) == [(0, False) if resume == "never" else (2, True), (5, True)]
    assert len(list(tmp_path.glob("earlier.old-*"))) == (1 if resume == "never" else 0)


def test_a_mistake_found_by_a_worker_is_not_retried(base_arguments, command, tmp_path):
    given = [*base_arguments, "strategy=fsdp", "devices=2", "batch_size=1", f"output_dir={tmp_path}", "sink=jsonl"]
    code, _, err = command([*given, "strategy.auto_wrap_policy=LlamaLayer", "launch.max_restarts=3"])
    assert code == 2, err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "strategy.auto_wrap_policy=LlamaLayer: LlamaForCausalLM has no such class" in errors[0]
    assert "LlamaDecoderLayer" in errors[0]
    assert "restart" not in err
    assert not psutil.wait_procs(workers_of(os.getpid()), timeout=10)[1], "no orphans"


def test_every_rank_has_a_log_with_its_stderr(base_arguments, tmp_path):
    """Also what is written below Python, here by the update of every rank."""
    given = [*base_arguments, *PAIR, f"output_dir={tmp_path / 'run'}", "max_steps=2", "sink=jsonl"]
    done = broken_run(given, tmp_path, at=-1, times=0)
    assert done.returncode == 0, done.stderr
    assert "speaks" not in done.stderr
    for rank in (0, 1):
        assert (tmp_path / f"run/logs/rank-{rank}.log").read_text().count(f"rank {rank} speaks") == 2


def test_only_one_rank_talks(base_arguments, corpus, spawn, tmp_path):
    """Notices of preparing the data too, which the launcher and then every rank does; the log has them all the same."""
    shutil.copytree(corpus, tmp_path / "text")
    (tmp_path / "text/image.png").write_bytes(b"x")
    run, data = tmp_path / "run", f"dataset.nameOrPath={tmp_path / 'text'}"
    process = spawn([*base_arguments, *PAIR, data, f"output_dir={run}", "max_steps=2"])
    out, _ = process.communicate(timeout=90)
    assert process.returncode == 0, out
    assert out.count("\nstep 2/2") == 1
    assert out.count("1 files are not read (1 × .png)") == 1
    assert [(run / f"logs/rank-{rank}.log").read_text().count("1 files are not read") for rank in (0, 1)] == [1, 1]
    assert "Warning" not in out


# -- the data ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def batches_of(base_arguments):
    """``batches_of(size)``: per step, what the loaders of ``size`` ranks hand to their engines, together: the numbers
    of the blocks, and the documents in these."""
    from pretrain.distributed.context import DistributedContext
    from pretrain.distributed.topology import Topology
    from pretrain.run import build
    from tests.training.test_trainer import prepared_of

    config, prepared = prepared_of(base_arguments)
    length, view = config.sequence_length, prepared.train.parts[0].view
    block_of = {tuple(view.read(i * length, (i + 1) * length)): i for i in range((view.num_tokens - 1) // length)}
    assert len(block_of) == (view.num_tokens - 1) // length, "a row must say which block it is"

    def read(size, *, steps=6):
        ranks = [DistributedContext(rank, Topology(workers_per_node=size)) for rank in range(size)]
        iterators = [iter(build.build_loader(config, prepared, MicroBatching(4 // size, 2), world)) for world in ranks]
        seen = []
        for _ in range(steps):
            rows = torch.cat([next(iterator).input_ids for iterator in iterators])
            blocks = sorted(block_of[tuple(row)] for row in rows.tolist())
            documents = {d for i in blocks for d in view.document_ids(i * length, (i + 1) * length + 1).tolist()}
            seen.append((blocks, documents))
        for iterator in iterators:
            iterator.close()
        return seen

    return read


def test_the_documents_behind_each_global_batch_are_the_same_at_any_world_size(batches_of):
    """Not what a loader says about them: the rows of each rank, traced back to their documents."""
    alone = batches_of(1)
    assert all(len(blocks) == 8 for blocks, _ in alone)
    assert len({tuple(blocks) for blocks, _ in alone}) == len(alone), "every step has rows of its own"
    for size in (2, 4):
        for (blocks, documents), (blocks_alone, documents_alone) in zip(batches_of(size), alone, strict=True):
            assert documents == documents_alone
            assert blocks == blocks_alone


def test_dp_on_a_cpu_is_one_process_and_says_so(base_arguments, command, tmp_path):
    code, _, err = command([*base_arguments, f"output_dir={tmp_path}", "strategy=dp", "devices=2", "max_steps=1"])
    assert code == 0, err
    assert "no GPU is visible, so this is one process on the CPU" in err
    facts = json.loads((tmp_path / "run.json").read_text())
    assert facts["world_size"] == 1
