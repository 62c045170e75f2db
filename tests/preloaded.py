"""Processes of Python that need not import torch again, because they are forked from one that has.

``Preloaded`` is a `subprocess.Popen` of a command such as `python -m pretrain …`. Its process is what Popen's would be: a child
of the caller with a pid, signals, a session, an environment, a working folder, streams, a main module and an exit of its own.
Only the imports are those of the server that it is forked from (like the workers of `pretrain.launch.agent`). The processes that
it starts itself, the fork server of its workers and the jobs of a sweep, are forked from a second such server, which is its
child. What tests imports or the start of the interpreter uses `subprocess.Popen`. Beyond Popen: with ``start_new_session``,
a terminal as its stdin becomes that of the session.
"""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import gc
import inspect
import json
import multiprocessing.util
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import threading
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

ROOT = str(Path(__file__).parents[1])
PR_SET_CHILD_SUBREAPER = 36  # option of prctl(2): orphans among the descendants become children of this process
CLONE_NEWNET = 0x40000000  # of setns(2)
LARGEST = 1 << 16  # bytes of an order: a command and its environment
FIRST_FREE = 500  # descriptors from here on are used while those of an order take their places
# Environment variables that are read when they are needed, so that a process may differ in them from its server.
READ_LATE = (
    "PRETRAIN_",
    "PYTEST_",
    "WANDB_",
    "TORCHELASTIC_",
    "PYTHONPATH",
    "TMPDIR",
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
)
READ_LATE += (
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_WORLD_SIZE",
    "ROLE_",
    "MASTER_",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE",
)
READ_LATE += (
    "COLUMNS",
    "LINES",
    "TERM",
    "NO_COLOR",
    "HYDRA_",
    "PYTORCH_NVML_",
    "CUDA_VISIBLE_DEVICES",
    "NETRC",
    "OMP_WAIT_POLICY",
)
READ_LATE += ("TORCH_NCCL_", "TORCHINDUCTOR_CACHE_DIR")  # torch sets the latter, too, when it has first needed it
READ_LATE += (
    "TORCH_CPP_LOG_LEVEL",
    "HF_HUB_DISABLE_PROGRESS_BARS",
    "HF_DATASETS_DISABLE_PROGRESS_BARS",
)  # a server sets them, too
FORK_SERVER = "multiprocessing.forkserver"
ROOM = "PRETRAIN_TEST_ROOM"  # of a server's environment: where its processes' own is written, for those who look from outside


class Server:
    """A process to fork from, at the other end of ``connection``."""

    def __init__(
        self, connection: socket.socket, environment: Mapping[str, str], process: subprocess.Popen[bytes] | None = None
    ) -> None:
        self.connection = connection
        self.process = process  # of the first server
        self.lock = threading.Lock()
        self.environment = dict(environment)

    def fork(self, order: dict[str, Any], descriptors: Sequence[int]) -> int:
        """Return the pid of a new child of this process that carries out ``order``."""
        with self.lock, adopting_orphans():
            socket.send_fds(self.connection, [json.dumps(order).encode()], list(descriptors))
            return int(self.connection.recv(32))

    def takes(self, environment: dict[str, str]) -> bool:
        """Return whether a process with this environment may be forked. A ``sitecustomize`` of others may have to come before
        all imports; those of `tests.runs`, in folders called ``injected``, and of `pretrain.tools.data_order` need not."""
        paths = map(Path, environment.get("PYTHONPATH", "").split(os.pathsep))
        if any((path / "sitecustomize.py").exists() and path.name not in ("injected", "data_order") for path in paths):
            return False
        names = environment.keys() | self.environment.keys()
        return all(name.startswith(READ_LATE) or environment.get(name) == self.environment.get(name) for name in names)


session: Mapping[str, str] = os.environ  # before a test has changed it; set by tests/conftest.py
server: Server | None = None
room = (0, 0)  # see `find_room`


@contextmanager
def adopting_orphans() -> Iterator[None]:
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def own_server() -> Server:
    """Return this process's server. It is started when it is first needed, and ends with this process."""
    global server
    if server is None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        words = [sys.executable, "-m", "tests.preloaded", str(theirs.fileno())]
        room = dict(session)
        room[ROOM] = " " * LARGEST  # the last one
        process = subprocess.Popen(words, cwd=ROOT, env=room, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()
        server = Server(ours, room, process)
    return server


EXECUTE_CHILD = inspect.signature(subprocess.Popen._execute_child)


class Preloaded(subprocess.Popen):
    """See the module. A command or an option that no server can carry out is started as by ``Popen``."""

    def _execute_child(self, *given: Any) -> None:
        named = EXECUTE_CHILD.bind(self, *given).arguments
        order = order_of(named["args"])
        environment = dict(os.environ if named["env"] is None else named["env"])
        if sys.platform != "linux" or order is None or named["preexec_fn"] or not own_server().takes(environment):
            super()._execute_child(*given)  # type: ignore[misc]
            return
        streams = (named["p2cread"], named["c2pwrite"], named["errwrite"])
        places = {number: (number if fd == -1 else fd) for number, fd in enumerate(streams)}
        places |= {fd: fd for fd in named["pass_fds"]}
        order |= place_in_the_system(named["cwd"], environment) | {"new_session": named["start_new_session"]}
        self.pid = own_server().fork(order | {"places": list(places)}, list(places.values()))
        self._child_created = True
        pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(named[name] for name in pipes))  # type: ignore[attr-defined]


def run_preloaded(words: Sequence[Any], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run ``python *words`` to its end, like `subprocess.run`, and capture what it prints."""
    command = [sys.executable, *map(str, words)]
    given = {name: options.pop(name, None) for name in ("input", "timeout")}
    if given["input"] is not None:
        options["stdin"] = subprocess.PIPE
    with Preloaded(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) as process:
        try:
            out, err = process.communicate(**given)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def order_of(command: Any) -> dict[str, Any] | None:
    """Return what a command of Python runs: ``-m module``, ``-c code`` or a file, after ``-u`` and ``-P`` at most; before it
    may be ``ip netns exec NAME``."""
    words = [command] if isinstance(command, str | os.PathLike) else [os.fspath(word) for word in command]
    network = None
    if words[:3] == ["ip", "netns", "exec"]:
        network, words = words[3], words[4:]
    if words[0] != sys.executable:
        return None
    flags = []
    while words[1:] and words[1] in ("-u", "-P"):
        flags.append(words.pop(1))
    if words[1:2] and words[1].endswith(".py"):
        words.insert(1, "")
    if len(words) < 3 or words[1] not in ("-m", "-c", ""):
        return None
    return {"kind": words[1], "flags": flags, "what": words[2], "arguments": words[3:], "network": network}


def place_in_the_system(folder: Any, environment: dict[str, str]) -> dict[str, Any]:
    blocked = [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])]
    return {"folder": os.fspath(folder or os.getcwd()), "environment": environment, "blocked": blocked}


# -- in the server ------------------------------------------------------------------------------------------------------


def serve(connection: socket.socket) -> dict[str, Any]:
    """Fork a process for each order. Return in such a process, with its order; the server itself exits with its client."""
    while True:
        data, descriptors, _, _ = socket.recv_fds(connection, LARGEST, 250)
        if not data:
            os._exit(0)
        reader, writer = os.pipe()
        between = os.fork()
        if between == 0:  # exits at once, so that its child becomes the client's
            between = os.getpid()
            pid = os.fork()
            if pid == 0:
                for fd in (reader, writer, connection.detach()):
                    os.close(fd)
                while os.getppid() == between:
                    time.sleep(0.0005)
                order = json.loads(data)
                become(order, descriptors)
                return order
            os.write(writer, str(pid).encode())
            os._exit(0)
        os.waitpid(between, 0)
        connection.send(os.read(reader, 32))
        for fd in (reader, writer, *descriptors):
            os.close(fd)


def become(order: dict[str, Any], descriptors: list[int]) -> None:
    """Make this process what ``order`` asks for, up to its main module."""
    if order["new_session"]:
        os.setsid()
    if order.get("network"):
        enter_network(order["network"])
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD, FIRST_FREE) for fd in descriptors]
    for fd in descriptors:
        os.close(fd)
    for fd, target in zip(moved, order["places"], strict=True):
        os.dup2(fd, target)
        os.close(fd)
    if order["new_session"] and os.isatty(0):
        with suppress(OSError):  # the terminal of another session
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    os.chdir(order["folder"])
    os.environ.clear()
    os.environ.update(order["environment"])
    show_environment(order["environment"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, order["blocked"])
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=stream.isatty() or stream is sys.stderr, write_through="-u" in order["flags"])
    first = {"-m": order["folder"], "-c": ""}.get(order["kind"], os.path.dirname(os.path.realpath(order["what"])))
    more = [path for path in order["environment"].get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [
        *([] if "-P" in order["flags"] else [first]),
        *more,
        *(path for path in sys.path[1:] if path not in more),
    ]
    sys.argv = [order["kind"] or order["what"], *order["arguments"]]
    tempfile.tempdir = None
    if starts_processes(order):
        start_second_server()
    for path in more:  # as the interpreter does it when it starts
        if (file := Path(path) / "sitecustomize.py").exists():
            sys.modules.pop("sitecustomize", None)
            __import__("sitecustomize")
            assert sys.modules["sitecustomize"].__file__ == str(file)
            break


def enter_network(name: str) -> None:
    """Move this process into a network namespace, as ``ip netns exec`` does it."""
    with open(f"/run/netns/{name}") as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")


def find_room() -> tuple[int, int]:
    """Return the address and the size of this process's variable ``ROOM`` as the kernel has placed it."""
    start, end = (int(word) for word in Path("/proc/self/stat").read_text().rpartition(")")[2].split()[47:49])
    offset = Path("/proc/self/environ").read_bytes().index(f"{ROOM}=".encode())
    return start + offset, end - start - offset


def show_environment(environment: dict[str, str]) -> None:
    """Write it where the kernel looks for /proc/<pid>/environ."""
    block = b"".join(os.fsencode(f"{name}={value}") + b"\0" for name, value in environment.items())
    address, size = room
    ctypes.memset(address, 0, size)
    ctypes.memmove(address, block, min(len(block), size - 1))


def starts_processes(order: dict[str, Any]) -> bool:
    """Whether the process is likely to start others. A wrong guess costs time only."""
    if FORK_SERVER in order["what"]:
        return False
    signs = ("devices=", "strategy=", "hydra/", "experiment=", "-m")
    return order["what"] != "pretrain" or any(word.startswith(signs) for word in order["arguments"])


def start_second_server() -> None:
    """Fork a server of this process's own, while the process is still as it was forked."""
    global server
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, to the whole group
        ours.close()
        nowhere = os.open(os.devnull, os.O_RDWR)
        keep = theirs.fileno()
        for fd in (0, 1, 2):
            os.dup2(nowhere, fd)
        os.closerange(3, keep)
        os.closerange(keep + 1, 2 * FIRST_FREE)
        order = serve(theirs)
        run(order)
    theirs.close()
    server = Server(ours, os.environ)
    subprocess.Popen = Job  # type: ignore[misc]
    for name, module in sys.modules.items():
        if name.startswith("torch.distributed.elastic.multiprocessing.") and hasattr(module, "Popen"):  # of torchrun
            module.Popen = Job
    multiprocessing.util.spawnv_passfds = start_fork_server


class Job(Preloaded):
    """What a run starts: preloaded if it is another run."""

    def _execute_child(self, *given: Any) -> None:
        order = order_of(given[0])
        kind = Preloaded if order and (order["kind"], order["what"]) == ("-m", "pretrain") else subprocess_popen
        kind._execute_child(self, *given)  # type: ignore[attr-defined]


subprocess_popen = subprocess.Popen
spawnv_passfds = multiprocessing.util.spawnv_passfds


def start_fork_server(path: Any, command: Sequence[Any], descriptors: Sequence[int]) -> int:
    """Start one of multiprocessing's helpers, in the place of `multiprocessing.util.spawnv_passfds`. Only the fork server
    imports anything."""
    if FORK_SERVER not in command[-1]:
        return spawnv_passfds(path, command, descriptors)
    environment = dict(os.environ)
    if not own_server().takes(environment):
        return spawnv_passfds(path, command, descriptors)
    order = {"kind": "-c", "flags": [], "what": command[-1], "arguments": [], "new_session": False}
    places = [0, 1, 2, *descriptors]
    return own_server().fork(order | place_in_the_system(None, environment) | {"places": places}, places)


def run(order: dict[str, Any]) -> NoReturn:
    """Run the main module of the process that `become` has made, and exit as the interpreter does, but for its clean-up: it
    would take ten times as long as the fork."""
    code: Any = 0
    try:
        run_main(order)
    except SystemExit as left:
        code = left.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code if isinstance(code, int) else 1 if code else 0)


def run_main(order: dict[str, Any]) -> None:
    if order["kind"] == "-m":
        runpy.run_module(order["what"], run_name="__main__", alter_sys=True)
    elif order["kind"] == "":
        runpy.run_path(order["what"], run_name="__main__")
    else:
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(order["what"], "<string>", "exec"), main.__dict__)


if __name__ == "__main__":
    from pretrain.runtime.console import quiet_libraries

    quiet_libraries()  # before the imports, as a run does it
    import matplotlib.figure  # noqa: F401

    import pretrain.cli.main
    import pretrain.launch.preload  # noqa: F401
    from tests import preloaded

    gc.freeze()  # a collection in a process that is forked would copy the memory of all that the imports have made
    preloaded.room = preloaded.find_room()
    preloaded.run(preloaded.serve(socket.socket(fileno=int(sys.argv[1]))))
