"""On which network interfaces a run listens: on one machine the loopback alone, on several the one they meet on.

Processes of a run trust each other, so nobody else may reach them. torch's stores listen on all interfaces unless they
get a socket that listens already (``master_listen_fd``); gloo goes by the host's name, NCCL by its own choice, unless
they are given an interface. Source: https://docs.pytorch.org/docs/stable/distributed.html#choosing-the-network-interface-to-use
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from contextlib import suppress
from ipaddress import ip_address

LOOPBACK = "127.0.0.1"
SIOCGIFFLAGS, SIOCGIFADDR = 0x8913, 0x8915  # linux/sockios.h: the flags of an interface, its address
IFF_LOOPBACK = 0x8  # linux/if.h
BACKLOG = 2048  # torch's own
_before: dict[str, str | None] = {}  # the environment's values of what is set here; None: it had none


def keep_to_loopback() -> None:
    """Make gloo and NCCL listen on the loopback, for a run on one machine, whatever the environment says."""
    if interface := interface_of(LOOPBACK):
        _set({"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": f"={interface}"})


def keep_to_interface_towards(host: str) -> None:
    """Make gloo and NCCL listen on the interface by which ``host`` is reached, where the environment names none.

    Where this machine's own name leads to the loopback nothing is known of the others: nothing is set.
    """
    with suppress(OSError):
        address = address_towards(host)
        if not is_loopback(address) and (interface := interface_of(address)):
            given = {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": f"={interface}"}
            _set({name: value for name, value in given.items() if not os.environ.get(name)})


def _set(variables: dict[str, str]) -> None:
    for name, value in variables.items():
        _before.setdefault(name, os.environ.get(name))
        os.environ[name] = value


def restore_environment() -> None:
    """Undo ``keep_to_loopback`` and ``keep_to_interface_towards``: the processes that this one starts later, and its own
    next process group, choose anew."""
    for name, value in _before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    _before.clear()


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens on the address of ``host`` and no other. Raises ``OSError``: not an address of this machine,
    or another program's port."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    found = socket.socket(family, kind, protocol)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(BACKLOG)
    except OSError:
        found.close()
        raise
    return found


def address_towards(host: str) -> str:
    """The address from which this machine reaches ``host``. Nothing is sent. Raises ``OSError``: no such host, no route."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def is_loopback(address: str) -> bool:
    """Whether no other machine reaches ``address``."""
    return ip_address(address.partition("%")[0]).is_loopback


def hides_address(host: str, address: str) -> bool:
    """Whether ``host`` is a name that other machines may know, although here it leads to the loopback (``address``)."""
    return is_loopback(address) and host not in (address, "localhost")


def interface_of(address: str) -> str | None:
    """The network interface that has ``address`` (IPv4)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface without an address
                found = _ask(probe, SIOCGIFADDR, name)
                if socket.inet_ntoa(found[20:24]) == address:
                    return name
    return None


def is_loopback_interface(name: str) -> bool:
    """Raises ``OSError``: this machine has no such interface."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        [flags] = struct.unpack_from("H", _ask(probe, SIOCGIFFLAGS, name), 16)  # after the name
    return bool(flags & IFF_LOOPBACK)


def interfaces_of_nccl(value: str) -> list[str]:
    """The interfaces of this machine that NCCL_SOCKET_IFNAME names: prefixes, with ``=`` before them whole names; each may
    have a port. Empty for ``^``, which names those that are not meant.

    Source: https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html#nccl-socket-ifname
    """
    if value.startswith("^"):
        return []
    named = [word.partition(":")[0] for word in value.removeprefix("=").split(",") if word]
    here = [name for _, name in socket.if_nameindex()]
    if value.startswith("="):
        return [name for name in here if name in named]
    return [name for name in here if name.startswith(tuple(named))]


def _ask(probe: socket.socket, request: int, interface: str) -> bytes:
    return fcntl.ioctl(probe.fileno(), request, struct.pack("256s", os.fsencode(interface)[:15]))
