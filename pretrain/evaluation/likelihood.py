"""How likely a model finds continuations of contexts: what multiple-choice and cloze questions are scored by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from pretrain.data.batch import IGNORE, Batch
from pretrain.evaluation.shared_batches import turns

if TYPE_CHECKING:
    from pretrain.strategy.engine import InferenceEngine


class Request(NamedTuple):
    """A continuation of a context, both as tokens; neither is empty."""

    context: Sequence[int]
    continuation: Sequence[int]


class Likelihood(NamedTuple):
    """The log-probability of a continuation in nats, and whether greedy decoding gives it."""

    logprob: float
    is_greedy: bool


def likelihoods(engine: InferenceEngine, requests: Sequence[Request], *, batch_size: int) -> list[Likelihood]:
    """Return the likelihood of every request, in order.

    The ranks share the batches; all must call this with equal requests, and all get the results. The model must be in eval
    mode. A request longer than the model's positions loses the beginning of its context, and of its continuation if that alone
    is longer. Raises ``EvaluationInterrupted`` after a stop signal.
    """
    order = sorted(range(len(requests)), key=lambda i: -_length(requests[i]))  # the longest first: memory shows at once
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    world = engine.world
    here: dict[int, Likelihood] = {}
    for index, counts in turns(len(batches), world, engine.interrupted):
        chosen = batches[index]
        batch = _batch([requests[i] for i in chosen], engine.model.num_positions)
        found = engine.evaluate_rows(batch.to(world.device)).tolist()
        lengths = (batch.labels != IGNORE).sum(1).tolist()
        if counts:
            for i, (nats, correct), length in zip(chosen, found, lengths, strict=True):
                here[i] = Likelihood(-nats, int(correct) == length)
    every: dict[int, Likelihood] = {}
    for part in world.all_gather_object(lambda: here):
        every |= part
    return [every[i] for i in range(len(requests))]


def encode_pair(tokenizer: Any, context: str, continuation: str, *, first: int) -> Request:
    """Return the tokens of ``context + continuation``, split where the context ends, after the token ``first``.

    They are encoded as one text, because a token may reach over the space between both: spaces at the end of the context belong
    to the continuation.
    """
    spaces = len(context) - len(context.rstrip(" "))
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation

    def encode(text: str) -> list[int]:
        return [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]

    start, whole = encode(context) if context else [], encode(context + continuation)
    cut = len(start) if len(whole) > len(start) else len(whole) - 1  # at least one token to predict
    return Request([first, *whole[:cut]], whole[cut:])


def _length(request: Request) -> int:
    return len(request.context) + len(request.continuation)


def _batch(requests: Sequence[Request], num_positions: int) -> Batch:
    """Return the requests as rows that end with padding, which causal attention does not see."""
    rows = [[*context, *continuation][-num_positions - 1 :] for context, continuation in requests]
    longest = max(map(len, rows)) - 1
    ids, labels = torch.zeros(len(rows), longest, dtype=torch.int64), torch.full((len(rows), longest), IGNORE)
    for n, (row, request) in enumerate(zip(rows, requests, strict=True)):
        ids[n, : len(row) - 1] = torch.tensor(row[:-1])
        targets = min(len(request.continuation), len(row) - 1)
        labels[n, len(row) - 1 - targets : len(row) - 1] = torch.tensor(row[-targets:])
    return Batch(ids, labels, None, int((labels != IGNORE).sum()))
