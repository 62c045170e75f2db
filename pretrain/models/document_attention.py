"""Attention of packed documents one after the other, on a CPU, without a mask of S × S values.

transformers' sdpa builds a mask [n, 1, S, S] where positions restart. At S = 16,384 that is 256 MiB for each row, and attention
then computes all S × S products. Here the bounds of the documents take the place of the mask, attention runs on slices of the
row, and no product of two documents is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pretrain.models.packing import sequences

# Longer rows are attended document by document. For shorter ones the mask is small (4 MiB for each row), and losses stay the
# same to the last bit as those of earlier versions.
LONG = 2048


def by_documents(hf: Any, position_ids: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """Return positions and, in the place of a mask, the bounds of the documents in each row: int32 [1, 1, documents, 2] with row
    and length. transformers passes a mask of four dimensions to every layer as it is."""
    use_bounds()
    bounds = [(row, length) for row, lengths in enumerate(_lengths(position_ids)) for length in lengths]
    return {"position_ids": position_ids, "attention_mask": torch.tensor(bounds, dtype=torch.int32)[None, None]}


def _lengths(position_ids: Tensor) -> Iterator[list[int]]:
    """Yield the lengths of the documents of each row."""
    for numbers in sequences(position_ids):
        yield torch.unique_consecutive(numbers, return_counts=True)[1].tolist()


@cache
def use_bounds() -> None:
    """Make transformers' ``sdpa`` accept bounds in the place of a mask. Everything else it computes as before."""
    AttentionInterface.register("sdpa", _attention)


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Return the output of attention [n, S, heads, d] for ``query`` [n, heads, S, d]; keys and values may have fewer heads."""
    if attention_mask is None or attention_mask.dtype != torch.int32:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if any(options.get(key) is not None for key in ("sliding_window", "position_bias", "cache")):
        raise ValueError("documents one by one: not with windows or position biases")
    bounds = attention_mask[0, 0].tolist()
    # split, whose backward is one concatenation; that of a slice would make a gradient as large as the row for each document
    rows = zip(*(tensor.split(1) for tensor in (query, key, value)), strict=True)
    outputs = []
    for number, row in enumerate(rows):
        lengths = [length for owner, length in bounds if owner == number]
        documents = zip(*(tensor.split(lengths, 2) for tensor in row), strict=True)
        each = [sdpa_attention_forward(module, q, k, v, None, **options)[0] for q, k, v in documents]
        outputs.append(torch.cat(each, 1))
    return torch.cat(outputs), None
