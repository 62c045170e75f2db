"""Check the endpoint at which the agents of several nodes meet, and the address and interfaces of this machine."""

from __future__ import annotations

import errno
import os
import socket
import threading
from contextlib import suppress

from pretrain.distributed.sockets import (
    address_towards,
    hides_address,
    interfaces_of_nccl,
    is_loopback,
    is_loopback_interface,
)
from pretrain.runtime.errors import UserError

ANSWER_SECONDS = 3.0


def is_here(endpoint: str) -> bool:
    """Return whether ``endpoint`` is an address of this machine.

    Raises ``UserError`` when it is not a valid address, or when another program listens there.
    """
    host, port = split(endpoint)
    if not 0 < port < 2**16:
        raise UserError(f"launch.endpoint={endpoint}: a port is a number from 1 to 65535")
    try:
        address = socket.gethostbyname(host)
    except OSError as error:
        raise UserError(f"launch.endpoint={endpoint}: no such host: {error}") from None
    if hides_address(host, address):
        raise UserError(
            f"launch.endpoint={endpoint}: on this machine {host} is {address}, where no other machine reaches it; "
            f"give the address that they reach: launch.endpoint=<address>:{port}"
        )
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except PermissionError:
            raise UserError(f"launch.endpoint={endpoint}: ports below 1024 need more rights") from None
        except OSError as error:
            if error.errno != errno.EADDRINUSE:  # the address belongs to another node
                return False
            if not _is_meeting_point(address, port):
                raise UserError(
                    f"launch.endpoint={endpoint}: another program listens there; choose a free port"
                ) from None
    return True


def split(endpoint: str) -> tuple[str, int]:
    """Return host and port of ``host:port``."""
    host, port = endpoint.rsplit(":", 1)
    return host, int(port)


def own_address(endpoint: str) -> str:
    """Return this machine's address on the route to ``endpoint``. Raises ``UserError`` where there is no route."""
    try:
        return address_towards(split(endpoint)[0])
    except OSError as error:
        raise UserError(f"launch.endpoint={endpoint}: can't be reached: {error.strerror}") from None


def check_interfaces(host: str, device_type: str) -> None:
    """Check the interfaces that the environment gives to gloo and NCCL, for nodes that meet at ``host``.

    Raises ``UserError`` where gloo or NCCL would use only the loopback interface, on which no other node reaches this one,
    or where gloo would use an interface that does not exist: the ranks would wait for each other and fail. Nodes that meet
    at a loopback address are on one machine and are not checked.
    """
    with suppress(OSError):
        if is_loopback(address_towards(host)):
            return
    gloo, nccl = (os.environ.get(f"{name}_SOCKET_IFNAME", "") for name in ("GLOO", "NCCL"))
    _check_interfaces("GLOO", gloo, [name for name in gloo.split(",") if name], host)
    if device_type == "cuda":
        _check_interfaces("NCCL", nccl, interfaces_of_nccl(nccl), host)


def _check_interfaces(library: str, value: str, names: list[str], host: str) -> None:
    given = f"{library}_SOCKET_IFNAME={value} in the environment"
    advice = f"unset it, or name the interface by which this machine reaches {host}"
    try:
        loopback = [is_loopback_interface(name) for name in names]
    except OSError:
        here = ", ".join(name for _, name in socket.if_nameindex())
        raise UserError(f"{given}: this machine's interfaces are {here}; {advice}") from None
    if loopback and all(loopback):
        raise UserError(f"{given}: that is the loopback, by which no other machine reaches this one; {advice}")


def check_master(rank: int) -> None:
    """Raise ``UserError`` when another program listens at MASTER_ADDR and MASTER_PORT, where rank 0 has to listen.

    torch's ranks would otherwise wait for its answer forever.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        socket.create_connection((address, port), timeout=ANSWER_SECONDS).close()
    except OSError:  # nothing listens there yet
        return
    if rank == 0 or not _is_meeting_point(address, port):
        raise UserError(f"MASTER_PORT={port}: another program listens there at {address}; choose a free port")


def _is_meeting_point(address: str, port: int) -> bool:
    """Return whether a torch store answers at the address: the agent of another node that shares this machine.

    The connection is made in a thread, because torch waits forever for an answer from a program that is not a store.
    """
    from torch.distributed import DistNetworkError, TCPStore

    found = threading.Event()

    def ask() -> None:
        with suppress(DistNetworkError):
            TCPStore(address, port, is_master=False, wait_for_workers=False)
            found.set()

    threading.Thread(target=ask, daemon=True).start()
    return found.wait(ANSWER_SECONDS)
