"""Pass the information whether a batch has packed documents to transformers, which would otherwise read it from the device.

When no attention mask is given, transformers checks in every forward whether positions restart anywhere. On a GPU that check is
a synchronisation: the kernel queue is empty after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from pretrain.models.transformers_internals import own_packing_check, set_packing_check

_lock, _inside = Lock(), 0


@contextmanager
def known(*, packed: bool) -> Iterator[None]:
    """Inside this context no model reads from the device whether positions restart. With ``packed=True`` documents are kept apart
    where positions restart; with ``False`` each row is one document.

    Several threads may be inside at the same time, with parts of one batch (``strategy=dp``). Compiled graphs don't need this
    context, because they contain no such check. It has no effect if another version of transformers checks elsewhere."""
    _enter(1, sequences if packed else lambda position_ids: None)
    try:
        yield
    finally:
        _enter(-1, own_packing_check)


def _enter(change: int, answer: Any) -> None:
    """Count the threads inside. The first one to enter and the last one to leave replace the function of transformers."""
    global _inside
    with _lock:
        _inside += change
        if own_packing_check is not None and _inside == max(change, 0):
            set_packing_check(answer)


def sequences(position_ids: Tensor) -> Tensor:
    """Return int64 [n, S]: for each token of ``position_ids`` [n, S] the number of its document within its row."""
    steps = torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1)
    return (steps != 1).cumsum(-1)
