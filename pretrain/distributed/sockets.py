"""The network interfaces on which a run listens: only the loopback on one machine, otherwise the one that connects the nodes.

The processes of a run trust each other, so no other process may be able to connect to them. torch's stores listen on all
interfaces unless they get a socket that is already listening (``master_listen_fd``). gloo uses the interface of the
host's name and NCCL selects one itself, unless an interface is set.
Source: https://docs.pytorch.org/docs/stable/distributed.html#choosing-the-network-interface-to-use
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from contextlib import suppress
from ipaddress import ip_address

LOOPBACK = "127.0.0.1"
SIOCGIFFLAGS, SIOCGIFADDR = 0x8913, 0x8915  # linux/sockios.h: read an interface's flags, its address
IFF_LOOPBACK = 0x8  # linux/if.h
BACKLOG = 2048  # the value that torch uses
_before: dict[str, str | None] = {}  # previous values of the variables set here; None: unset


def keep_to_loopback() -> None:
    """Make gloo and NCCL listen on the loopback, for a run on one machine. This overrides the environment."""
    if interface := interface_of(LOOPBACK):
        _set({"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": f"={interface}"})


def keep_to_interface_towards(host: str) -> None:
    """Make gloo and NCCL listen on the interface through which ``host`` is reached, unless the environment sets one.

    If ``host`` is reached through the loopback, the interface towards the other machines is unknown and nothing is set.
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
    """Undo ``keep_to_loopback`` and ``keep_to_interface_towards``, so that later child processes and the next process group
    of this process are not affected."""
    for name, value in _before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    _before.clear()


def listening(host: str, port: int) -> socket.socket:
    """Return a socket that listens on the address of ``host`` only. Raises ``OSError`` if this is not an address of this machine
    or another program uses the port."""
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
    """Return the address from which this machine reaches ``host``. Nothing is sent. Raises ``OSError`` if there is no such host
    or no route to it."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def is_loopback(address: str) -> bool:
    """Return whether ``address`` can't be reached from other machines."""
    return ip_address(address.partition("%")[0]).is_loopback


def hides_address(host: str, address: str) -> bool:
    """Return whether ``host`` is a name that resolves to the loopback (``address``) here but may be known to other machines."""
    return is_loopback(address) and host not in (address, "localhost")


def interface_of(address: str) -> str | None:
    """Return the network interface that has ``address`` (IPv4)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface without an address
                found = _ask(probe, SIOCGIFADDR, name)
                if socket.inet_ntoa(found[20:24]) == address:
                    return name
    return None


def is_loopback_interface(name: str) -> bool:
    """Return whether ``name`` is a loopback interface. Raises ``OSError`` if this machine has no such interface."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        [flags] = struct.unpack_from("H", _ask(probe, SIOCGIFFLAGS, name), 16)  # after the name
    return bool(flags & IFF_LOOPBACK)


def interfaces_of_nccl(value: str) -> list[str]:
    """Return the interfaces of this machine that the value of NCCL_SOCKET_IFNAME selects. It lists prefixes, or after ``=``
    exact names; each may have a port. The result is empty for a value with ``^``, which lists excluded interfaces.

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
