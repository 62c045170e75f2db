"""Whether a batch has packed documents, told to transformers by whoever made it.

Asked for no mask, transformers (5.20 to 5.23, ``masking_utils.find_packed_sequence_indices``) reads from the device in every
forward whether positions restart anywhere. A GPU that has to answer has nothing left to do when it has done so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

ASKED = "find_packed_sequence_indices"
_asks = vars(masking_utils).get(ASKED)
_lock, _inside = Lock(), 0


@contextmanager
def known(*, packed: bool) -> Iterator[None]:
    """Inside, no model asks: documents are kept apart where positions restart, or each row is one. Threads may be inside
    together, with parts of one batch (``strategy=dp``). Not for compiled graphs, in which nothing is asked, and no help where
    this transformers asks elsewhere."""
    _enter(1, sequences if packed else lambda position_ids: None)
    try:
        yield
    finally:
        _enter(-1, _asks)


def _enter(change: int, answer: Any) -> None:
    """Count the threads inside; the first and the last change what transformers asks."""
    global _inside
    with _lock:
        _inside += change
        if _asks is not None and _inside == max(change, 0):
            setattr(masking_utils, ASKED, answer)


def sequences(position_ids: Tensor) -> Tensor:
    """int64 [n, S]: the number, in its row, of the document that a token of ``position_ids`` [n, S] belongs to."""
    steps = torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1)
    return (steps != 1).cumsum(-1)
