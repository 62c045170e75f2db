"""Where a run listens while it is under way: on one machine on the loopback at most, on several where they meet."""

import os
import socket
import stat
from pathlib import Path

import psutil
import pytest

from pretrain.distributed import sockets
from pretrain.launch.network import check_interfaces
from pretrain.runtime.errors import UserError
from tests.launch.test_launch import LONG, PAIR, steps, wait_for
from tests.launch.test_mistakes import free_port
from tests.launch.test_nodes import namespaces, two_nodes  # noqa: F401 (fixtures)

SLOW = pytest.mark.slow
STRATEGIES = ["ddp", pytest.param("fsdp", marks=SLOW), pytest.param("deepspeed", marks=SLOW)]


def tree(pid: int) -> list[psutil.Process]:
    one = psutil.Process(pid)
    return [one, *one.children(recursive=True)]


def listening(pid: int) -> set[str]:
    """The addresses on which a process and its children listen."""
    found = (c for process in tree(pid) for c in process.net_connections(kind="tcp"))
    return {c.laddr.ip for c in found if c.status == psutil.CONN_LISTEN}


def files_of_sockets(pid: int) -> set[Path]:
    """The unix sockets that have a name."""
    found = (c.laddr for process in tree(pid) for c in process.net_connections(kind="unix"))
    return {Path(name) for name in found if name}


def other_interface() -> str | None:
    """One that leads out of this machine."""
    up = (name for name, found in psutil.net_if_stats().items() if found.isup)
    addresses = psutil.net_if_addrs()
    reached = (
        n for n in up if any(a.family == socket.AF_INET and not a.address.startswith("127.") for a in addresses[n])
    )
    return next(reached, None)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_on_one_machine_nothing_listens_beyond_the_loopback(strategy, base_arguments, spawn, tmp_path):
    """Even where the environment names another interface, as a cluster's may."""
    run, interface = tmp_path / "run", other_interface()
    outside = {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface} if interface else {}
    words = [*base_arguments, *LONG, *PAIR, f"strategy={strategy}", f"output_dir={run}"]
    process = spawn(words, env=os.environ | outside)
    wait_for(lambda: steps(run) >= 2, process)
    assert_within_this_user(process.pid)


def assert_within_this_user(pid: int) -> None:
    """TCP on the loopback only, gloo's; unix sockets in folders that no other user can enter."""
    assert listening(pid) == {"127.0.0.1"}
    for file in files_of_sockets(pid):
        assert file.is_absolute(), "an abstract name is everybody's"
        assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


@SLOW
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_the_jobs_of_a_sweep_and_wandb_listen_no_further(launcher, base_arguments, spawn, tmp_path):
    """Two jobs of two processes at a time, each with W&B's service."""
    words = [*base_arguments, *LONG, *PAIR, "strategy=ddp", "lr=1e-3,2e-3", f"sweep_dir={tmp_path / 'sweep'}"]
    process = spawn(["-m", f"hydra/launcher={launcher}", *words, "sink=[jsonl,wandb]", "sink.wandb.mode=offline"])
    jobs = [tmp_path / "sweep" / f"lr={lr}" for lr in ("0.001", "0.002")]
    wait_for(lambda: all(steps(job) >= 2 and list(job.glob("wandb/*run*/*.wandb")) for job in jobs), process)
    assert_within_this_user(process.pid)
    services = [p for p in tree(process.pid) if "wandb-core" in p.name()]
    assert len(services) == 2
    assert all(list(files_of_sockets(service.pid)) for service in services)


@SLOW
def test_processes_that_a_script_starts_on_one_machine(base_arguments, spawn, tmp_path):
    """Rank 0 listens for the others at MASTER_ADDR only."""
    run = tmp_path / "run"
    address = os.environ | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    words = [*base_arguments, *LONG, "strategy=ddp", "batch_size=1", f"output_dir={run}"]
    ranks = [spawn(words, env=address | {"RANK": str(rank)}) for rank in (0, 1)]
    wait_for(lambda: steps(run) >= 2, ranks[0])
    found = {address for rank in ranks for address in listening(rank.pid)}
    assert found <= {"127.0.0.1", "::1"}


@SLOW
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_nodes_listen_where_they_meet(strategy, two_nodes, tmp_path):  # noqa: F811
    """Each has the loopback beside the cable; /proc/net knows the connections of all namespaces' processes."""
    run = tmp_path / "run"
    nodes = two_nodes(run, f"strategy={strategy}", "max_steps=100000", "evaluate_every=null")
    wait_for(lambda: steps(run) >= 2, nodes[0])
    for number, node in enumerate(nodes, start=1):
        assert _listening_in_namespace(node.pid) == {f"10.77.0.{number}"}


def _listening_in_namespace(pid: int) -> set[str]:
    """Of all that listens in the network namespace of a process: it holds nothing but the run."""
    found = set()
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            if state == "0A":
                digits = bytes.fromhex(local.partition(":")[0])
                words = [digits[i : i + 4][::-1] for i in range(0, len(digits), 4)]
                found.add(socket.inet_ntop(socket.AF_INET if len(words) == 1 else socket.AF_INET6, b"".join(words)))
    return found


# -- the parts of it ----------------------------------------------------------------------------------------------------


@pytest.fixture
def unset(monkeypatch):
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_gloo_and_nccl_are_given_an_interface(unset, monkeypatch):
    sockets.keep_to_loopback()
    lo = sockets.interface_of("127.0.0.1")
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == (lo, f"={lo}")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    sockets.keep_to_loopback()
    assert os.environ["GLOO_SOCKET_IFNAME"] == lo, "whatever the environment says"


def test_several_machines_keep_to_the_interface_towards_the_first(unset, monkeypatch):
    interface = other_interface()
    if interface is None:
        pytest.skip("needs a network interface beside the loopback")
    [address, *_] = [a.address for a in psutil.net_if_addrs()[interface] if a.family == socket.AF_INET]
    sockets.keep_to_interface_towards("localhost")
    assert "GLOO_SOCKET_IFNAME" not in os.environ, "it leads nowhere"
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    sockets.keep_to_interface_towards(address)
    assert os.environ["GLOO_SOCKET_IFNAME"] == interface
    assert os.environ["NCCL_SOCKET_IFNAME"] == "ib0", "what is asked for by name stays"


ELSEWHERE = "198.51.100.1"  # RFC 5737: nobody's


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        (
            "GLOO",
            "lo",
            "that is the loopback, by which no other machine reaches this one; unset it, or name the interface",
        ),
        ("GLOO", "lo,lo,", "that is the loopback"),
        (
            "GLOO",
            "nosuch0",
            "this machine's interfaces are .*lo.*; unset it, or name the interface by which this machine",
        ),
        ("GLOO", "lo,nosuch0", "this machine's interfaces are "),
        ("NCCL", "lo", "that is the loopback"),
        ("NCCL", "=lo:4000", "that is the loopback"),
        ("NCCL", "=lo,nosuch0", "that is the loopback"),
    ],
)
def test_several_nodes_are_refused_the_loopback(variable, value, says, unset, monkeypatch):
    monkeypatch.setenv(f"{variable}_SOCKET_IFNAME", value)
    with pytest.raises(UserError, match=f"^{variable}_SOCKET_IFNAME={value} in the environment: {says}"):
        check_interfaces(ELSEWHERE, "cuda")
    check_interfaces("127.0.0.1", "cuda")  # nodes that meet there are on this machine
    check_interfaces("localhost", "cuda")


@pytest.mark.parametrize(
    ("variable", "value"),
    [("GLOO", ""), ("NCCL", ""), ("NCCL", "^eth0,docker"), ("NCCL", "^lo"), ("NCCL", "=nosuch0"), ("NCCL", "nosuch0")],
)
def test_what_may_lead_to_another_node_is_left_to_the_library(variable, value, unset, monkeypatch):
    monkeypatch.setenv(f"{variable}_SOCKET_IFNAME", value)
    check_interfaces(ELSEWHERE, "cuda")


def test_without_gpus_the_interface_of_nccl_does_not_matter(unset, monkeypatch):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")
    check_interfaces(ELSEWHERE, "cpu")


def test_one_interface_that_leads_out_is_enough(unset, monkeypatch):
    if (interface := other_interface()) is None:
        pytest.skip("needs a network interface beside the loopback")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", f"lo,{interface}")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", f"lo,{interface[:-1]}")
    check_interfaces(ELSEWHERE, "cuda")


def test_a_node_that_would_listen_on_the_loopback(unset, command, base_arguments, monkeypatch, tmp_path):
    """Before any data is read."""
    if (interface := other_interface()) is None:
        pytest.skip("needs a network interface beside the loopback")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    [address, *_] = [a.address for a in psutil.net_if_addrs()[interface] if a.family == socket.AF_INET]
    meeting = ["strategy=ddp", "launch.nodes=2", f"launch.endpoint={address}:{free_port()}"]
    code, _, err = command([*base_arguments, *meeting, f"output_dir={tmp_path / 'run'}"])
    assert code == 2, err
    [line] = err.splitlines()
    assert line.startswith("error: GLOO_SOCKET_IFNAME=lo in the environment: that is the loopback, ")
    assert line.endswith(f"unset it, or name the interface by which this machine reaches {address}")


@pytest.mark.parametrize("found", [None, "eth7"])
def test_what_is_set_is_undone(found, unset, monkeypatch):
    if found:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", found)
    sockets.keep_to_loopback()
    sockets.keep_to_loopback()
    sockets.restore_environment()
    assert (os.environ.get("GLOO_SOCKET_IFNAME"), os.environ.get("NCCL_SOCKET_IFNAME")) == (found, None)


def test_a_run_leaves_the_environment_as_it_was(unset, command, base_arguments, tmp_path):
    """The next run of this process may meet other machines."""
    code, _, err = command([*base_arguments, "strategy=fsdp", "max_steps=1", f"output_dir={tmp_path / 'run'}"])
    assert code == 0, err
    assert {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"}.isdisjoint(os.environ)


def test_a_store_listens_at_its_address_only():
    from datetime import timedelta

    from pretrain.distributed.context import tcp_store

    port, wait = free_port(), timedelta(seconds=10)
    store = tcp_store("127.0.0.1", port, is_host=True, timeout=wait)
    assert {c.laddr.ip for c in psutil.Process().net_connections("tcp") if c.laddr.port == port and not c.raddr} == {
        "127.0.0.1"
    }
    tcp_store("127.0.0.1", port, is_host=False, timeout=wait).set("key", "value")
    assert store.get("key") == b"value"
    with pytest.raises(UserError, match=f"can't listen at 127.0.0.1:{port}: Address already in use"):
        tcp_store("127.0.0.1", port, is_host=True, timeout=wait)


def test_a_name_that_leads_nowhere_is_no_endpoint(monkeypatch):
    """Debian gives a machine's own name the address 127.0.1.1."""
    from pretrain.launch.network import is_here

    monkeypatch.setattr(socket, "gethostbyname", {"node1": "127.0.1.1"}.get)
    with pytest.raises(
        UserError, match=r"endpoint=node1:29500: on this machine node1 is 127.0.1.1, .* give the address"
    ):
        is_here("node1:29500")


# -- torch's rendezvous keeps its state as a pickle ---------------------------------------------------------------------


class Payload:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self):
        return Path.touch, (self.victim,)


def test_the_state_of_a_rendezvous_runs_nothing(tmp_path):
    import pickle

    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import _NodeDesc, _RendezvousState

    from pretrain.launch.rendezvous_pickle import loads

    state = _RendezvousState()
    state.participants[_NodeDesc("node1", 7, 0)] = 0
    state.wait_list.add(_NodeDesc("node2", 8, 0))
    read = loads(pickle.dumps(state))
    assert (read.participants, read.wait_list) == (state.participants, state.wait_list)
    with pytest.raises(pickle.UnpicklingError, match="no part of a rendezvous' state"):
        loads(pickle.dumps(Payload(tmp_path / "victim")))
    assert not (tmp_path / "victim").exists()


def test_a_planted_state_in_the_store_runs_nothing(tmp_path):
    """What anyone who reaches the meeting point can write there."""
    import pickle
    from base64 import b64encode
    from datetime import timedelta

    from torch.distributed.elastic.rendezvous import RendezvousStateError

    from pretrain.distributed.context import tcp_store
    from pretrain.launch.rendezvous import meet

    port = free_port()
    given = {"nodes": 2, "local_address": "127.0.0.1", "timeout_seconds": 5.0}
    handler = meet(f"127.0.0.1:{port}", is_host=True, **given)
    attacker = tcp_store("127.0.0.1", port, is_host=False, timeout=timedelta(seconds=10))
    attacker.set("torch.rendezvous.pretrain", b64encode(pickle.dumps(Payload(tmp_path / "victim"))).decode())
    with pytest.raises(RendezvousStateError):
        handler.next_rendezvous()
    assert not (tmp_path / "victim").exists()
