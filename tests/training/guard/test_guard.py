"""What the guard makes of each verdict: who is skipped, gone back for, counted and told, step by step."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pretrain.runtime.errors import UserError
from pretrain.training.guard import quarantine
from pretrain.training.guard.config import GuardConfig
from pretrain.training.guard.guard import BadStep, Guard
from pretrain.training.guard.quarantine import Quarantine
from pretrain.training.guard.spike_detector import FINE, NONFINITE

NAN, INF = math.nan, math.inf


def guard_of(*, agree=lambda verdict: verdict, **settings):
    written = []
    guard = Guard(
        GuardConfig(**settings),
        device=torch.device("cpu"),
        quarantine=lambda bad: written.append(bad) or "its documents",
        agree=agree,
    )
    return guard, written


def step(guard, loss, norm=1.0, *, number=1, first_sample=0):
    look = guard.check(torch.tensor(loss))
    guard.note(look.loss, torch.tensor(norm), step=number, first_sample=first_sample)
    return look


def warmed_up(guard, steps=40):
    for number in range(steps):
        step(guard, 2.0 + 0.01 * (number % 5), number=number)
    assert list(guard.handle_bad_steps(at_once=True)) == []


BAD = BadStep(7, 40, "spike", "skip", 9.25, 1.5, 12.345)


def test_a_bad_step_in_words():
    assert str(BAD) == "step 7: loss 9.25 (12.3 robust standard deviations up), gradient norm 1.5"
    other = BadStep(7, 40, "nonfinite", "skip", NAN, INF, 3.0)
    assert str(other) == "step 7: loss nan, gradient norm inf"


def test_what_is_found_is_told_and_written_down(capsys):
    guard, written = guard_of()
    step(guard, 2.0, number=3, first_sample=8)
    step(guard, NAN, 5.0, number=4, first_sample=12)
    (found,) = guard.handle_bad_steps(at_once=True)
    assert written == [found]
    assert (found.step, found.first_sample, found.reason, found.action) == (4, 12, "nonfinite", "skip")
    assert math.isnan(found.loss)
    assert found.grad_norm == 5.0
    said = "step 4: loss nan, gradient norm 5: not trained, skip; quarantine.jsonl has its documents: its documents"
    assert capsys.readouterr().err.splitlines() == [said]


def test_a_spike_is_found_with_its_numbers():
    guard, _ = guard_of(spike="rollback", spike_zscore=6.0, window=8)
    warmed_up(guard)
    look = step(guard, 9.0, 4.0, number=41, first_sample=160)
    (found,) = guard.handle_bad_steps(at_once=True)
    assert (found.step, found.first_sample, found.reason, found.action) == (41, 160, "spike", "rollback")
    assert (found.loss, found.grad_norm) == (9.0, 4.0)
    assert found.zscore > 6.0
    assert found.zscore == pytest.approx(float(look.zscore))


def test_another_ranks_verdict_counts():
    """Finite numbers of its own, and yet not trained: the norm is told as nan."""
    guard, _ = guard_of(agree=lambda verdict: torch.full_like(verdict, NONFINITE))
    look = step(guard, 2.0, 3.0, number=1)
    assert bool(look.should_skip(torch.tensor(3.0)))
    (found,) = guard.handle_bad_steps(at_once=True)
    assert found.loss == 2.0
    assert math.isnan(found.grad_norm)


@pytest.mark.parametrize(("loss", "norm"), [(2.0, INF), (INF, 3.0)])
def test_own_numbers_are_told_as_they_are(loss, norm):
    guard, _ = guard_of()
    step(guard, loss, norm)
    (found,) = guard.handle_bad_steps(at_once=True)
    assert (found.loss, found.grad_norm) == (loss, norm)


def test_the_ranks_agree_once_for_a_norm():
    asked = []
    guard, _ = guard_of(agree=lambda verdict: asked.append(int(verdict)) or verdict)
    look = guard.check(torch.tensor(2.0))
    one, other = torch.tensor(1.0), torch.tensor(INF)
    assert [bool(look.should_skip(norm)) for norm in (one, one, other, other)] == [False, False, True, True]
    assert int(look.verdict(one)) == FINE
    assert asked == [FINE, NONFINITE, FINE]


def test_doubt_lasts_until_a_step_is_trained():
    guard, _ = guard_of()
    assert (guard.last_step_skipped, guard.restore_below) == (False, None)
    guard.note_rollback(7)
    assert (guard.last_step_skipped, guard.restore_below) == (True, 7)
    step(guard, NAN)
    list(guard.handle_bad_steps(at_once=True))
    assert (guard.last_step_skipped, guard.restore_below) == (True, 7)
    step(guard, 2.0)
    list(guard.handle_bad_steps(at_once=True))
    assert (guard.last_step_skipped, guard.restore_below) == (False, None)


def test_a_gpus_last_step_is_read_after_the_next_or_at_once():
    guard, _ = guard_of()
    guard._late = True
    for number in (1, 2):
        step(guard, NAN, number=number)
    assert [bad.step for bad in guard.handle_bad_steps(at_once=False)] == [1]
    assert [bad.step for bad in guard.handle_bad_steps(at_once=False)] == []
    assert [bad.step for bad in guard.handle_bad_steps(at_once=True)] == [2]
    host, _ = guard_of()
    step(host, NAN, number=1)
    assert [bad.step for bad in host.handle_bad_steps(at_once=False)] == [1]


def test_stop_and_the_limits_say_what_to_do(capsys):
    guard, written = guard_of(nonfinite="stop")
    step(guard, NAN, 5.0, number=4)
    with pytest.raises(UserError) as stopped:
        list(guard.handle_bad_steps(at_once=True))
    assert str(stopped.value) == (
        "guard.nonfinite=stop: step 4: loss nan, gradient norm 5; nothing of this step is saved; its documents: its "
        "documents (quarantine.jsonl has their text); the same command continues from the last checkpoint, with a lower lr, "
        "other data or another guard setting"
    )
    assert len(written) == 1
    assert capsys.readouterr().err == ""
    guard, _ = guard_of(nonfinite="rollback", max_rollbacks=0)
    step(guard, NAN)
    with pytest.raises(UserError, match=r"^guard.max_rollbacks=0: "):
        list(guard.handle_bad_steps(at_once=True))


def test_only_skips_without_a_trained_step_between_them_are_counted():
    guard, _ = guard_of(max_skips_in_a_row=2)
    for loss in (NAN, NAN, 1.0, NAN, NAN):
        step(guard, loss)
        list(guard.handle_bad_steps(at_once=True))
    step(guard, NAN)
    with pytest.raises(UserError, match=r"^guard.max_skips_in_a_row=2: "):
        list(guard.handle_bad_steps(at_once=True))


def test_what_a_checkpoint_keeps():
    guard, _ = guard_of(spike="skip", window=8, nonfinite="rollback")
    for number, (loss, sample) in enumerate([(2.0, 0), (NAN, 24), (2.5, 4), (NAN, 8)]):
        step(guard, loss, number=number, first_sample=sample)
    list(guard.handle_bad_steps(at_once=True))
    guard._skips_in_a_row = 3
    saved = json.loads(json.dumps(guard.state_dict()))
    assert saved == {"losses": [2.0, 2.5], "skips_in_a_row": 3, "passed_over": [8, 24]}
    other, _ = guard_of(spike="skip", window=8)
    other.blocklist = {16}
    step(other, NAN)
    other.load_state_dict(saved)
    assert list(other.handle_bad_steps(at_once=True)) == [], "what was not yet read is of the branch that was left"
    assert other.state_dict() == {"losses": [2.0, 2.5], "skips_in_a_row": 3, "passed_over": [8, 16, 24]}
    other.load_state_dict({})
    assert other.state_dict() == {"losses": [], "skips_in_a_row": 0, "passed_over": [8, 16, 24]}


def test_a_batch_that_is_left_out_leaves_doubt():
    guard, _ = guard_of()
    guard.blocklist = {8}
    assert (guard.is_blocklisted(4), guard.last_step_skipped) == (False, False)
    assert (guard.is_blocklisted(8), guard.last_step_skipped) == (True, True)
    assert (guard.is_blocklisted(4), guard.last_step_skipped) == (False, True), "an earlier doubt stays"


def test_a_scaled_loss_leaves_infinite_gradients_to_the_scaler():
    guard = Guard(GuardConfig(), device=torch.device("cpu"), quarantine=str, scaled=True)
    assert not bool(step(guard, 2.0, INF).should_skip(torch.tensor(INF)))
    assert list(guard.handle_bad_steps(at_once=True)) == []


# quarantine.jsonl ---------------------------------------------------------------------------------------------------


class Texts:
    """Stands for a loader: each document's tokens are its letters."""

    def __init__(self, *texts):
        self.of = texts

    def texts(self, first_sample):
        for n, text in enumerate(self.of):
            document = SimpleNamespace(path=f"{n}.txt", index=n, start=10 * n, hash=255 + n, number=n)
            yield document, np.array([ord(letter) for letter in text])


LETTERS = SimpleNamespace(decode=lambda tokens: "".join(map(chr, tokens)))


def written_of(tmp_path, *texts):
    path = tmp_path / "quarantine.jsonl"
    return path, Quarantine(path, loader=Texts(*texts), tokenizer=LETTERS)


def test_the_record_of_a_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(quarantine.time, "time", lambda: 12.5)
    path, write = written_of(tmp_path, "x" * 201, "é")
    assert write(BadStep(7, 40, "spike", "skip", 9.25, INF, 12.5)) == "0.txt#0, 1.txt#1"
    assert "é" in path.read_text(encoding="utf-8")
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "step": 7,
        "time": 12.5,
        "reason": "spike",
        "action": "skip",
        "loss": 9.25,
        "grad_norm": None,
        "zscore": 12.5,
        "first_sample": 40,
        "documents": [
            {"path": "0.txt", "start": 0, "index": 0, "hash": "00000000000000ff", "excerpt": "x" * 200},
            {"path": "1.txt", "start": 10, "index": 1, "hash": "0000000000000100", "excerpt": "é"},
        ],
    }


@pytest.mark.parametrize(
    ("count", "says"),
    [(1, "0.txt#0"), (3, "0.txt#0, 1.txt#1, 2.txt#2"), (5, "0.txt#0, 1.txt#1, 2.txt#2 and 2 more")],
)
def test_three_documents_are_named(count, says, tmp_path):
    _, write = written_of(tmp_path, *["x"] * count)
    assert write(BAD) == says


def test_a_file_that_cannot_be_written_costs_no_run(tmp_path, capsys):
    path, write = written_of(tmp_path, "x")
    path.mkdir()
    assert write(BAD) == "0.txt#0"
    said = capsys.readouterr().err
    assert said.startswith(f"{path} can't be written: ")
    assert said.endswith("; the run continues\n")


def test_it_is_on_the_disk(tmp_path, monkeypatch):
    asked = []
    keep = quarantine.replace_file
    monkeypatch.setattr(quarantine, "replace_file", lambda *a, **k: asked.append(k) or keep(*a, **k))
    written_of(tmp_path, "x")[1](BAD)
    assert asked == [{"flush": True}]
