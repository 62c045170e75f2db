"""Fill in the middle: documents are rearranged, so that a model learns to write what is between two texts (Bavarian et al. 2022,
arXiv:2207.14255).

A document is cut at two random places into prefix, middle and suffix. It becomes ``<prefix> prefix <suffix> suffix <middle>
middle`` (PSM) or ``<prefix> <suffix> suffix <middle> prefix middle`` (SPM, in the variant of the paper that shares its tokens
with PSM). Cuts are between tokens. What a row gains by the three tokens is cut off at its end.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pretrain.data.order import mix_bits
from pretrain.runtime.errors import UserError

KNOWN_TOKENS = (  # prefix, suffix and middle
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, SantaCoder, Granite
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen, CodeGemma
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder's first release
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),  # CodeLlama
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("[PREFIX]", "[SUFFIX]", "[MIDDLE]"),  # Codestral
)
SHORTEST = 3  # tokens of a document that is rearranged
DRAWS = 4  # random numbers for each document: whether, in which order, and two cuts


@dataclass(frozen=True)
class FillInMiddle:
    """How the documents of a part are rearranged.

    Attributes:
        rate: share of the documents that are rearranged.
        spm_rate: share of these that are in the order of SPM.
        prefix: token before the prefix.
        suffix: token before the suffix.
        middle: token before the middle.
    """

    rate: float
    spm_rate: float
    prefix: int
    suffix: int
    middle: int

    def apply(
        self,
        tokens: NDArray[np.int64],
        begins: NDArray[np.bool_],
        rows: NDArray[np.int64],
        seeds: NDArray[np.uint64],
        *,
        around: Collection[int],
    ) -> None:
        """Rearrange documents of ``rows`` of ``tokens`` [n, S+1] in place, and move their marks in ``begins``.

        ``seeds`` has a number for each of ``rows``, of which the cuts are a function. The tokens ``around`` a document (separator
        and BOS) stay where they are.
        """
        for row, seed in zip(rows.tolist(), seeds, strict=True):
            edges = np.flatnonzero(begins[row])
            edges = np.unique(np.concatenate([[0], edges, [tokens.shape[1]]]))
            drawn = mix_bits(seed ^ mix_bits(np.arange(DRAWS * (len(edges) - 1), dtype=np.uint64))).reshape(-1, DRAWS)
            numbers = (drawn >> np.uint64(11)) * 2.0**-53  # in [0, 1)
            pieces = [
                self._rearranged(tokens[row, start:stop], draw, around)
                if draw[0] < self.rate
                else tokens[row, start:stop]
                for start, stop, draw in zip(edges[:-1].tolist(), edges[1:].tolist(), numbers, strict=True)
            ]
            marked = begins[row, edges[:-1]]
            starts = np.cumsum([0, *(len(piece) for piece in pieces[:-1])])
            tokens[row] = np.concatenate(pieces)[: tokens.shape[1]]
            begins[row] = False
            there = starts < tokens.shape[1]
            begins[row, starts[there]] = marked[there]

    def _rearranged(
        self, document: NDArray[np.int64], draw: NDArray[np.float64], around: Collection[int]
    ) -> NDArray[np.int64]:
        first = int(int(document[0]) in around)
        last = len(document) - int(len(document) > first and int(document[-1]) in around)
        body = document[first:last]
        if len(body) < SHORTEST:
            return document
        low, high = sorted((draw[2:] * (len(body) + 1)).astype(int).tolist())
        prefix, middle, suffix = body[:low], body[low:high], body[high:]
        if draw[1] < self.spm_rate:
            found = [[self.prefix, self.suffix], suffix, [self.middle], prefix, middle]
        else:
            found = [[self.prefix], prefix, [self.suffix], suffix, [self.middle], middle]
        return np.concatenate([document[:first], *found, document[last:]])


def fill_in_middle(rate: float, spm_rate: float, vocabulary: dict[str, int]) -> FillInMiddle | None:
    """Return how documents are rearranged with the tokens of a tokenizer's ``vocabulary``; ``None`` for a rate of 0.

    Raises ``UserError`` for a tokenizer without such tokens.
    """
    if not rate:
        return None
    found = next((names for names in KNOWN_TOKENS if all(name in vocabulary for name in names)), None)
    if found is None:
        known = ", ".join(names[0] for names in KNOWN_TOKENS)
        raise UserError(f"dataset.fim_rate={rate:g}: the tokenizer has no tokens for it, such as {known}")
    return FillInMiddle(rate, spm_rate, *(vocabulary[name] for name in found))
