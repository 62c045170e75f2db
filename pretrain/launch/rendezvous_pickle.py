"""Restrict what torch unpickles from the store of a rendezvous, where every machine of the network may write.

Private to torch (seen in 2.10.0 and 2.13.0): ``dynamic_rendezvous`` keeps its state in the store with the module ``pickle`` that
it has imported, and the state consists of the classes in ``KNOWN``. ``tests/launch/test_sockets.py`` fails when these change.
"""

from __future__ import annotations

import io
import pickle
from types import SimpleNamespace
from typing import Any

from torch.distributed.elastic.rendezvous import dynamic_rendezvous

KNOWN = {  # the classes in the pickled state of a rendezvous
    (dynamic_rendezvous.__name__, "_RendezvousState"),
    (dynamic_rendezvous.__name__, "_NodeDesc"),
    ("builtins", "set"),
    *(("datetime", name) for name in ("datetime", "timedelta", "timezone")),
}


def restrict_unpickling() -> None:
    """Make torch's rendezvous read its state with `loads`."""
    restricted = SimpleNamespace(dumps=pickle.dumps, loads=loads, PickleError=pickle.PickleError)
    vars(dynamic_rendezvous)["pickle"] = restricted


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in KNOWN:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of a rendezvous' state")
        return super().find_class(module, name)


def loads(state: bytes) -> Any:
    """Return the unpickled state of a rendezvous.

    Raises ``pickle.UnpicklingError`` for any other class, whose code is not executed.
    """
    return _Unpickler(io.BytesIO(state)).load()
