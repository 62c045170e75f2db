"""Where the agents of several nodes meet, and by which of its addresses this machine is reached from there."""

from __future__ import annotations

import errno
import os
import socket
import threading
from contextlib import suppress

from pretrain.errors import UserError
from pretrain.sockets import address_towards, hides_address

ANSWER_SECONDS = 3.0


def is_here(endpoint: str) -> bool:
    """Whether the meeting point is an address of this machine.

    Raises ``UserError`` when it is no address, or when something that is no agent of ours listens there.
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
            if error.errno != errno.EADDRINUSE:  # not an address of this machine: another node's
                return False
            if not _is_meeting_point(address, port):
                raise UserError(
                    f"launch.endpoint={endpoint}: another program listens there; choose a free port"
                ) from None
    return True


def split(endpoint: str) -> tuple[str, int]:
    host, port = endpoint.rsplit(":", 1)
    return host, int(port)


def own_address(endpoint: str) -> str:
    """The address from which this machine reaches the meeting point. Raises ``UserError``: no route."""
    try:
        return address_towards(split(endpoint)[0])
    except OSError as error:
        raise UserError(f"launch.endpoint={endpoint}: can't be reached: {error.strerror}") from None


def check_master(rank: int) -> None:
    """Raises ``UserError`` when another program listens at MASTER_ADDR and MASTER_PORT, which rank 0 is to open: torch's
    ranks would wait for its answer without end."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        socket.create_connection((address, port), timeout=ANSWER_SECONDS).close()
    except OSError:  # nobody is there yet
        return
    if rank == 0 or not _is_meeting_point(address, port):
        raise UserError(f"MASTER_PORT={port}: another program listens there at {address}; choose a free port")


def _is_meeting_point(address: str, port: int) -> bool:
    """Whether a torch store answers there: the agent of another node, if several share this machine.

    Asked in a thread, for torch waits without end for an answer from what is no store.
    """
    from torch.distributed import DistNetworkError, TCPStore

    found = threading.Event()

    def ask() -> None:
        with suppress(DistNetworkError):
            TCPStore(address, port, is_master=False, wait_for_workers=False)
            found.set()

    threading.Thread(target=ask, daemon=True).start()
    return found.wait(ANSWER_SECONDS)
