"""Two nodes: two commands, each with an agent and workers of its own, in two network namespaces of this machine, which
reach each other by a virtual cable only. Where it is about agents that do not come together, both are simply here."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pretrain.telemetry.run_file import read_run_file
from pretrain.telemetry.sinks.jsonl import read_records
from tests.launch.test_launch import steps, wait_for
from tests.launch.test_mistakes import free_port
from tests.preloaded import Preloaded
from tests.runs import losses, starts

ROOT = Path(__file__).parents[2]


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def namespaces():
    """Two network namespaces, 10.77.0.1 and 10.77.0.2: their names, and each one's interface."""
    if os.geteuid() or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the command ip (iproute2)")
    names = [f"pretrain-{os.getpid()}-{letter}" for letter in "ab"]
    cables = [f"pt{os.getpid()}{letter}" for letter in "ab"]
    if (made := ip("netns", "add", names[0])).returncode:
        pytest.skip(f"no network namespaces on this machine: {made.stderr.strip()}")
    ip("netns", "add", names[1])
    ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
    for number, (name, cable) in enumerate(zip(names, cables, strict=True), start=1):
        ip("link", "set", cable, "netns", name)
        ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", cable)
        ip("-n", name, "link", "set", "lo", "up")
        up = ip("-n", name, "link", "set", cable, "up")
        assert up.returncode == 0, up.stderr
    yield dict(zip(names, cables, strict=True))
    for name in names:
        ip("netns", "del", name)


@pytest.fixture
def two_nodes(namespaces, base_arguments, exact_model):
    """Start the same command on both nodes; both processes."""
    started = []

    def start(run, *more):
        meeting = ["launch.nodes=2", "launch.endpoint=10.77.0.1:29555", "devices=1", "batch_size=1", "sink=jsonl"]
        given = [*base_arguments, f"model_name={exact_model('llama')}", *meeting, f"output_dir={run}", *more]
        for name in namespaces:
            command = ["ip", "netns", "exec", name, sys.executable, "-m", "pretrain", *given]
            started.append(Preloaded(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        return started

    yield start
    end(started)


def end(started):
    """Of whatever a test has left of its nodes."""
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.mark.parametrize("strategy", ["fsdp", pytest.param("ddp", marks=pytest.mark.slow)])
def test_two_nodes_equal_one_process(strategy, two_nodes, base_arguments, exact_model, command, tmp_path):
    nodes = two_nodes(tmp_path / "nodes", f"strategy={strategy}", "max_steps=6")
    for node in nodes:
        out, _ = node.communicate(timeout=120)
        assert node.returncode == 0, out
    assert read_run_file(tmp_path / "nodes")["world_size"] == 2
    given = [*base_arguments, f"model_name={exact_model('llama')}", "max_steps=6", "sink=jsonl"]
    code, _, err = command([*given, f"output_dir={tmp_path / 'alone'}"])
    assert code == 0, err
    assert losses(tmp_path / "nodes") == pytest.approx(losses(tmp_path / "alone"), abs=1e-5)


@pytest.mark.slow
def test_a_rank_that_dies_on_one_node_restarts_both(two_nodes, tmp_path):
    run = tmp_path / "run"
    nodes = two_nodes(run, "strategy=ddp", "max_steps=400", "evaluate_every=null", "launch.max_restarts=1")
    wait_for(lambda: steps(run) >= 20, nodes[0])
    worker = [c for child in psutil.Process(nodes[1].pid).children() for c in child.children()]
    worker[0].kill()
    outs = [node.communicate(timeout=180)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outs
    assert any("was killed by SIGKILL; all ranks start again" in out for out in outs), outs
    facts = read_run_file(run)
    assert (facts["status"], facts["steps"], facts["restarts"]) == ("finished", 400, 1)
    [_, (step, resumed)] = starts(run)
    assert resumed
    assert step >= 10, "of the last checkpoints"
    seen = [r["step"] for r in read_records(run / "metrics.jsonl") if r["event"] == "train"]
    assert seen == list(range(1, 401))


@pytest.mark.slow
def test_a_signal_on_one_node_stops_both(two_nodes, tmp_path):
    run = tmp_path / "run"
    nodes = two_nodes(run, "strategy=ddp", "max_steps=100000", "evaluate_every=null")
    wait_for(lambda: steps(run) >= 5, nodes[0])
    psutil.Process(nodes[1].pid).terminate()
    outs = [node.communicate(timeout=60)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [75, 75], outs
    facts = read_run_file(run)
    assert facts["status"] == "stopped"
    assert (run / f"checkpoints/step-{facts['steps']:08d}/COMPLETE.json").exists()


MACHINE = """
mount --bind "$1" /etc/hosts
python3 -c 'import socket, sys; socket.sethostname(sys.argv[1])' "$2"
shift 2
exec "$@"
"""


@pytest.fixture
def machines(namespaces, tmp_path):
    """The same command on machines called node1 and node2, whose ``own`` names lead each to one address; both
    processes."""
    started = []

    def start(words, *, own):
        for number, (name, cable) in enumerate(namespaces.items(), start=1):
            hosts = tmp_path / f"hosts-{number}"
            lines = {f"node{n}": f"10.77.0.{n}" for n in (1, 2)} | {f"node{number}": own or f"10.77.0.{number}"}
            hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{at} {node}\n" for node, at in lines.items()))
            command = ["ip", "netns", "exec", name, "unshare", "--mount", "--uts", "sh", "-ec", MACHINE, "sh"]
            command += [hosts, f"node{number}", *words]
            environment = os.environ | ({"GLOO_SOCKET_IFNAME": cable} if own else {})
            started.append(
                subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
            )
        return started

    yield start
    end(started)


def documented_torchrun():
    """The line of docs/strategies.md that stands for several machines."""
    page = (ROOT / "docs/strategies.md").read_text()
    [line] = re.findall(r"^torchrun --nnodes .*$", page, re.MULTILINE)
    return shlex.split(line)[1:]


@pytest.mark.slow
@pytest.mark.parametrize("own", [None, "127.0.1.1"], ids=["by name", "as Debian names itself"])
def test_the_documented_torchrun_line(own, machines, base_arguments, exact_model, command, tmp_path):
    """With one process a node. Where a machine's own name leads to itself only, gloo is told the interface."""
    given = [*base_arguments, f"model_name={exact_model('llama')}", "max_steps=6", "sink=jsonl"]
    line = [word.replace("/shared", str(tmp_path)) for word in documented_torchrun()]
    line[line.index("--nproc_per_node") + 1] = "1"
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *line,
        *given,
        "batch_size=1",
        f"output_dir={tmp_path / 'run'}",
    ]
    nodes = machines(words, own=own)
    outs = [node.communicate(timeout=180)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outs
    assert read_run_file(tmp_path / "run")["world_size"] == 2
    code, _, err = command([*given, f"output_dir={tmp_path / 'alone'}"])
    assert code == 0, err
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "alone"), abs=1e-5)


def here(base_arguments, run, *, timeout):
    """A command of one of two nodes that meet on this machine."""
    meeting = ["launch.nodes=2", f"launch.endpoint=127.0.0.1:{free_port()}", f"launch.timeout={timeout}"]
    return [*base_arguments, *meeting, "strategy=ddp", "batch_size=1", "sink=jsonl", f"output_dir={run}"]


@pytest.mark.slow
def test_a_node_that_nobody_joins(spawn, base_arguments, tmp_path):
    node = spawn([*here(base_arguments, tmp_path / "run", timeout=3), "devices=1"])
    out, _ = node.communicate(timeout=180)
    assert node.returncode == 1, out
    meeting, failure = out.splitlines()
    assert meeting.startswith("meeting 2 nodes at 127.0.0.1:")
    assert failure.startswith("the nodes did not meet within launch.timeout")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_nodes_with_unequal_devices(spawn, base_arguments, tmp_path):
    given = here(base_arguments, tmp_path / "run", timeout=90)
    nodes = [spawn([*given, f"devices={devices}"]) for devices in (1, 2)]
    outs = [node.communicate(timeout=180)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [2, 2], outs
    for out, meant in zip(outs, (2, 4), strict=True):
        errors = [line for line in out.splitlines() if line.startswith("error: ")]
        assert errors == [
            f"error: 3 processes have joined, {meant} were expected: give all nodes the same number of devices"
        ]
