"""Workers that others have started, torchrun or a script: they meet, train as one run, and end as torchrun expects it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pretrain.telemetry.run_file import read_run_file
from pretrain.telemetry.sinks.jsonl import read_records
from tests.launch.test_launch import BREAK, LONG, steps, wait_for
from tests.launch.test_mistakes import free_port
from tests.preloaded import run_preloaded
from tests.runs import injected, losses, starts

STRATEGIES = ["fsdp", *(pytest.param(s, marks=pytest.mark.slow) for s in ("ddp", "deepspeed"))]


def torchrun_words(arguments, *flags):
    flags = ["--standalone", "--nproc_per_node=2", *flags]
    return ["-m", "torch.distributed.run", *flags, "-m", "pretrain", *map(str, arguments)]


def torchrun(arguments, *flags, **options):
    return run_preloaded(torchrun_words(arguments, *flags), timeout=180, **options)


@pytest.fixture
def given(base_arguments, exact_model):
    """A short run, whatever number of processes it has."""
    return [*base_arguments, f"model_name={exact_model('llama')}", "max_steps=6", "sink=jsonl"]


@pytest.fixture
def losses_alone(given, command, tmp_path):
    code, _, err = command([*given, f"output_dir={tmp_path / 'alone'}"])
    assert code == 0, err
    return losses(tmp_path / "alone")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_under_torchrun_it_joins(strategy, given, losses_alone, tmp_path):
    done = torchrun([*given, f"strategy={strategy}", "batch_size=1", f"output_dir={tmp_path / 'joined'}"])
    assert done.returncode == 0, done.stderr
    assert read_run_file(tmp_path / "joined")["world_size"] == 2
    assert losses(tmp_path / "joined") == pytest.approx(losses_alone, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "deepspeed"])
def test_with_rank_and_world_size_alone_it_joins(strategy, given, losses_alone, spawn, tmp_path):
    """As a script starts processes; DeepSpeed by itself would want LOCAL_RANK too."""
    run = tmp_path / "joined"
    given = [*given, f"strategy={strategy}", "batch_size=1", f"output_dir={run}", "launch.max_restarts=2"]
    address = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    ranks = [spawn(given, env=address | {"RANK": str(rank)}) for rank in (0, 1)]
    outs = [rank.communicate(timeout=180)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outs
    assert outs[0].count("launch.max_restarts: no effect under RANK and WORLD_SIZE") == 1
    assert outs[1] == "", "one rank talks"
    assert read_run_file(run)["world_size"] == 2
    assert losses(run) == pytest.approx(losses_alone, abs=1e-5)


def test_a_mistake_under_torchrun_is_one_line_and_no_hang(base_arguments, tmp_path):
    done = torchrun([*base_arguments, "strategy=ddp", "devices=3", f"output_dir={tmp_path}"])
    assert done.returncode == 1  # torchrun's own
    assert done.stderr.count("error: devices=3, but 2 processes were started on this machine") == 1


def test_what_torchrun_decides_is_said(given, command, monkeypatch, tmp_path):
    torchruns = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_MAX_RESTARTS": "1",
    }
    for name, value in torchruns.items():
        monkeypatch.setenv(name, value)
    more = ["max_steps=1", "launch.max_restarts=2", "launch.endpoint=node1:29500", f"output_dir={tmp_path}"]
    code, _, err = command([*given, *more])
    assert code == 0, err
    assert "launch.max_restarts, launch.endpoint: no effect under RANK and WORLD_SIZE" in err
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in err


def test_what_torchrun_has_restarted_continues(given, command, monkeypatch, tmp_path):
    """By its count of restarts, of the same command: what resume=never has begun is not begun once more."""
    run = tmp_path / "run"
    torchruns = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "one"}
    for name, value in torchruns.items():
        monkeypatch.setenv(name, value)
    more = ["resume=never", "save_every=2", f"output_dir={run}"]
    seen = []
    for count, command_id, last in (("0", "one", 2), ("1", "one", 4), ("7", "one", 5), ("1", "two", 6)):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", command_id)
        code, _, err = command([*given, *more, f"max_steps={last}"])
        assert code == 0, err
        seen.append([step for step, _ in starts(run)])
    assert seen == [[0], [0, 2], [0, 2, 4], [0]], "another command's restart is none of this run's"


def test_the_place_of_a_rank_is_what_torchrun_says(monkeypatch):
    from pretrain.distributed.rank_info import RankInfo
    from pretrain.distributed.topology import Topology
    from pretrain.launch.launcher import rank_info

    said = {"RANK": "5", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RESTART_COUNT": "3"}
    for name, value in (said | {"TORCHELASTIC_RUN_ID": "id"}).items():
        monkeypatch.setenv(name, value)
    found = rank_info(Topology("cpu", 4, 2))
    assert found == RankInfo(5, 1, Topology("cpu", 4, 2), restarts=3, run_id="id", one_machine=False)
    assert rank_info(Topology("cpu", 8, 1)).one_machine


@pytest.mark.slow
def test_torchrun_starts_them_again(given, tmp_path):
    run = tmp_path / "run"
    environment = injected(tmp_path, BREAK.format(mark=str(tmp_path / "mark"), at=7, times=1))
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    arguments = [*given, "strategy=ddp", "batch_size=1", f"output_dir={run}", "max_steps=20"]
    done = torchrun(arguments, "--max-restarts=1", env=environment)
    assert done.returncode == 0, done.stderr
    assert starts(run) == [(0, False), (5, True)]
    facts = read_run_file(run)
    assert (facts["status"], facts["steps"], facts["restarts"]) == ("finished", 20, 1)
    seen = [r["step"] for r in read_records(run / "metrics.jsonl") if r["event"] == "train"]
    assert seen == list(range(1, 21))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_saves(number, base_arguments, tmp_path):
    """SIGTERM to torchrun alone; Ctrl-C to all, as a terminal sends it."""
    run = tmp_path / "run"
    arguments = [*base_arguments, *LONG, "strategy=ddp", "batch_size=1", f"output_dir={run}"]
    words = [sys.executable, *torchrun_words(arguments)]
    with subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        wait_for(lambda: steps(run) >= 15, process)
        workers = psutil.Process(process.pid).children(recursive=True)
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        out, _ = process.communicate(timeout=60)
    assert process.returncode not in (0, None), out
    assert not psutil.wait_procs(workers, timeout=10)[1], "no orphans"
    assert out.count("finishing this step, then saving") == 1
    facts = read_run_file(run)
    assert facts["status"] == "stopped"
    assert (run / f"checkpoints/step-{facts['steps']:08d}/COMPLETE.json").exists()
    done = torchrun([*arguments, f"max_steps={facts['steps'] + 2}"])
    assert done.returncode == 0, done.stderr
    assert starts(run)[-1] == (facts["steps"], True)


SLOW_FILES = """
import time
from pathlib import Path
from pretrain.data.tokenization import encode
read = encode.read
def slowly(*given):
    time.sleep(0.3)
    with open({log!r}, "a") as log:
        log.write("read\\n")
    return read(*given)
encode.read = slowly
"""


@pytest.mark.slow
@pytest.mark.parametrize("start", ["by itself", "torchrun"])
def test_preparing_may_take_longer_than_ranks_wait_for_each_other(start, given, tmp_path):
    """52 files at 0.3 s each, read once, by one process, while nobody waits in a group."""
    log = tmp_path / "log"
    environment = injected(tmp_path, SLOW_FILES.format(log=str(log))) | {"PRETRAIN_CACHE": str(tmp_path / "cache")}
    given = [*given, "strategy=ddp", "batch_size=1", "launch.timeout=10", f"output_dir={tmp_path / 'run'}"]
    own = ["-m", "pretrain", *given, "devices=2"]
    words = own if start == "by itself" else torchrun_words(given)
    done = run_preloaded(words, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    assert len(Path(log).read_text().splitlines()) == 52
