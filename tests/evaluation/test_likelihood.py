"""Likelihoods of continuations, against one forward per request."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.evaluation.likelihood import Request, encode_pair, likelihoods
from pretrain.evaluation.run_tasks import run_tasks
from tests.engines import engine_of

ENGINES = {name: engine_of(name) for name in ("llama", "gemma2")}  # with a fused loss, and with capped logits
for engine in ENGINES.values():
    engine.model.eval()
TOKENS = st.lists(st.integers(0, 96), min_size=1, max_size=9)


@torch.no_grad()
def alone(engine, request):
    ids = torch.tensor([[*request.context, *request.continuation]])
    logits = engine.model.hf(input_ids=ids, use_cache=False).logits[0, len(request.context) - 1 : -1]
    targets = torch.tensor(request.continuation)
    logprobs = torch.log_softmax(logits.float(), -1)[range(len(targets)), targets]
    return float(logprobs.sum()), bool((logits.argmax(-1) == targets).all())


@pytest.mark.parametrize("name", list(ENGINES))
@given(requests=st.lists(st.builds(Request, TOKENS, TOKENS), min_size=1, max_size=7), batch_size=st.integers(1, 4))
@settings(max_examples=15)
def test_equals_each_request_alone(name, requests, batch_size):
    engine = ENGINES[name]
    found = likelihoods(engine, requests, batch_size=batch_size)
    expected = [alone(engine, request) for request in requests]
    assert [f.logprob for f in found] == pytest.approx([logprob for logprob, _ in expected], rel=1e-4)
    assert [f.is_greedy for f in found] == [greedy for _, greedy in expected]


def test_the_most_likely_continuation_is_greedy():
    engine = ENGINES["llama"]
    token = int(engine.next_tokens(torch.tensor([[5, 6]]), torch.tensor([1])))
    best, other = likelihoods(engine, [Request([5, 6], [token]), Request([5, 6], [(token + 1) % 97])], batch_size=2)
    assert best.is_greedy
    assert not other.is_greedy
    assert best.logprob > other.logprob


def test_a_long_request_loses_the_beginning_of_its_context():
    engine = ENGINES["llama"]
    positions = engine.model.num_positions
    context = [i % 97 for i in range(positions + 10)]
    (found,) = likelihoods(engine, [Request(context, [1, 2])], batch_size=1)
    assert found.logprob == pytest.approx(alone(engine, Request(context[-positions + 1 :], [1, 2]))[0], rel=1e-4)


class Asking:
    """A task of six requests in three batches."""

    def evaluate(self, engine):
        likelihoods(engine, [Request([1], [n + 1]) for n in range(6)], batch_size=2)
        return []


def test_a_long_task_shows_that_it_is_alive_and_ends_at_a_stop_signal():
    engine, calls = ENGINES["llama"], []
    assert run_tasks({"long": Asking()}, engine, alive=lambda: calls.append("alive")) == []
    assert calls == ["alive"] * 4, "after each forward, and after the task"
    answers = iter([False, False, True])
    assert run_tasks({"long": Asking()}, engine, interrupted=lambda: next(answers)) is None, "before the second batch"
    assert run_tasks({"long": Asking()}, engine) == [], "the engine is as before"


class Words:
    """A tokenizer of words with the space before them; a merged token for `a b`."""

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        pieces, word = [], ""
        for character in text:
            if character == " " and word:
                pieces.append(word)
                word = ""
            word += character
        return {"input_ids": [len(piece) for piece in [*pieces, word] if piece]}


def test_spaces_at_the_end_of_the_context_belong_to_the_continuation():
    assert encode_pair(Words(), "one two ", "three", first=0) == Request([0, 3, 4], [6])
    assert encode_pair(Words(), "one two", " three", first=0) == Request([0, 3, 4], [6])
    assert encode_pair(Words(), "", "three", first=0) == Request([0], [5])
    assert encode_pair(Words(), "one", "two", first=0) == Request([0], [6]), (
        "one token for both: it is what is predicted"
    )
