"""The rendezvous of the agents: a single one needs no network, several use a store that one of them hosts.

Source: https://docs.pytorch.org/docs/stable/elastic/rendezvous.html
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from torch.distributed import HashStore
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, RendezvousTimeout

from pretrain.distributed.context import tcp_store
from pretrain.distributed.sockets import LOOPBACK
from pretrain.launch.network import split
from pretrain.launch.rendezvous_pickle import restrict_unpickling
from pretrain.runtime.errors import UserError

READ_SECONDS = 60


class SingleAgentRendezvous(RendezvousHandler):
    """The rendezvous of a run on one machine: a single agent, with the workers' ranks in its own memory."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._closed = False

    def get_backend(self) -> str:
        return "alone"

    def next_rendezvous(self) -> RendezvousInfo:
        return RendezvousInfo(HashStore(), 0, 1, RendezvousStoreInfo(LOOPBACK, 0))

    def is_closed(self) -> bool:
        return self._closed

    def set_closed(self) -> None:
        self._closed = True

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        self._closed = True
        return True


def meet(endpoint: str, *, nodes: int, is_host: bool, local_address: str, timeout_seconds: float) -> RendezvousHandler:
    """Return torch's rendezvous of ``nodes`` agents; the first agent on the endpoint's machine hosts the store.

    Raises ``UserError`` when no store answers at the endpoint.
    """
    host, port = split(endpoint)
    restrict_unpickling()
    try:
        store = _store(host, port, is_host=is_host)
        backend = C10dRendezvousBackend(store, "pretrain")
    except (RuntimeError, RendezvousConnectionError) as error:
        raise UserError(
            f"launch.endpoint={endpoint}: nothing answers there; is the command running on that machine?"
        ) from error
    return DynamicRendezvousHandler.from_backend(
        *("pretrain", store, backend, nodes, nodes, local_address),
        timeout=RendezvousTimeout(join=timedelta(seconds=timeout_seconds)),
    )


def _store(host: str, port: int, *, is_host: bool) -> Any:
    timeout = timedelta(seconds=READ_SECONDS)
    try:
        return tcp_store(host, port, is_host=is_host, timeout=timeout)
    except UserError:  # another agent on this machine hosts the store already
        return tcp_store(host, port, is_host=False, timeout=timeout)
