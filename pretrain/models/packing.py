"""Whether a batch has packed documents, told to transformers by whoever made it.

Asked for no mask, transformers (5.20 to 5.23, ``masking_utils.find_packed_sequence_indices``) reads from the device in every
forward whether positions restart anywhere. A GPU that has to answer has nothing left to do when it has done so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import masking_utils

ASKED = "find_packed_sequence_indices"


@contextmanager
def known(*, packed: bool) -> Iterator[None]:
    """Inside, no model asks: documents are kept apart where positions restart, or each row is one. Not for compiled graphs,
    in which nothing is asked, and no help where this transformers asks elsewhere."""
    before = vars(masking_utils).get(ASKED)
    if before is None:
        yield
        return
    setattr(masking_utils, ASKED, sequences if packed else lambda position_ids: None)
    try:
        yield
    finally:
        setattr(masking_utils, ASKED, before)


def sequences(position_ids: Tensor) -> Tensor:
    """int64 [n, S]: the number, in its row, of the document that a token of ``position_ids`` [n, S] belongs to."""
    steps = torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1)
    return (steps != 1).cumsum(-1)
