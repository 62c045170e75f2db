"""The fuzz: a few inputs of every kind find nothing, the same seed makes the same inputs, and what is wrong is found."""

import re
import sys
from pathlib import Path
from random import Random

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from fuzzing.edits import edit_bytes, edit_file  # noqa: E402
from fuzzing.kind import failure, refusal  # noqa: E402
from fuzzing.sandbox import HUNG, Result, forked  # noqa: E402
from fuzzing.values import Values  # noqa: E402

from tests.preloaded import run_preloaded  # noqa: E402


def fuzz(folder, *arguments):
    done = run_preloaded(["scripts/fuzz.py", "--findings", folder, *arguments], cwd=ROOT)
    return done.returncode, done.stdout + done.stderr


def counts(said):
    """The table's rows: kind → how many inputs, and how many of them ended as they should not."""
    rows = [line.split() for line in said.splitlines()]
    return {r[0]: (int(r[1]), sum(map(int, r[6:]))) for r in rows if len(r) == 9 and r[1].isdigit()}


QUICK = ("data", "tokenizers", "configs")  # the others begin with models, or runs of some seconds


def test_a_few_inputs(tmp_path):
    code, said = fuzz(tmp_path / "found", "--inputs", 3, "--seed", 1, *(w for kind in QUICK for w in ("--kind", kind)))
    assert code == 0, said
    assert counts(said) == dict.fromkeys(QUICK, (1, 0)) | {"all": (3, 0)}
    assert not (tmp_path / "found").exists()


@pytest.mark.slow
def test_two_minutes(tmp_path):
    """All kinds; one input alone is what it is among others."""
    code, said = fuzz(tmp_path / "found", "--minutes", 2, "--seed", 2)
    assert code == 0, said
    every = counts(said)
    assert set(every) == {*QUICK, "models", "checkpoints", "runs", "corpora", "mixtures", "all"}
    assert every["all"] == (sum(number for kind, (number, _) in every.items() if kind != "all"), 0)
    assert counts(fuzz(tmp_path / "found", "--input", 3, "--seed", 2)[1]) == {"checkpoints": (1, 0), "all": (1, 0)}


def test_edits_follow_from_the_seed():
    values, again = Values(3), Values(3)
    raw = b'{"a": [1, 2.5, null, "text"], "b": {"c": true}}'
    ours = [edit_file(Random(i), "x.json", raw, values) for i in range(300)]
    assert ours == [edit_file(Random(i), "x.json", raw, again) for i in range(300)]
    assert len(set(ours)) > 150
    assert len({edit_bytes(Random(i), raw) for i in range(300)}) > 150


def result(work, tmp_path):
    return forked(work, tmp_path)


def raise_in_the_project():
    from pretrain.optim.schedule import linear

    linear("a", total_steps=1, warmup_steps=2)


def abort():
    import os

    os.abort()


@pytest.mark.parametrize(
    ("work", "key"),
    [
        (raise_in_the_project, "TypeError in pretrain/optim/schedule.py:linear"),
        (abort, "signal 6 in ?"),
        (lambda: 7, "exit code 7 in ?"),
    ],
)
def test_a_failure_is_found(work, key, tmp_path):
    found = failure(result(work, tmp_path))
    assert (found.what, found.key) == ("traceback", key)


def test_a_hang_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr("fuzzing.sandbox.CPU_SECONDS", 1)

    def forever():
        while True:
            pass

    found = result(forever, tmp_path)
    assert found.code == HUNG
    assert failure(found).what == "hang"
    assert "in forever" in found.err, "its stack"


@pytest.mark.parametrize(
    ("said", "what"),
    [
        ("a notice\nerror: data/a.json: broken\n", "refused"),
        ("error: something is broken\n", "other"),
        ("error: data/a.json:\n  broken\n", "other"),
        ("error: data/a.json: broken\nerror: again\n", "other"),
        (f"error: data/a.json: {'x' * 5000}\n", "other"),
        ("", "other"),
    ],
)
def test_a_refusal_is_one_line_with_a_name(said, what):
    assert refusal(Result(2, "", said), ("a.json",)).what == what


def test_a_finding_is_kept_with_its_command(tmp_path):
    """A base that is never what it is said to be: every input finds something."""
    from fuzzing.campaign import Campaign
    from fuzzing.kind import Base, Kind, Verdict, other

    class Never(Kind):
        name, variants = "never", ("only",)

        def make(self, variant, place):
            (place / "a.json").write_text("[1, 2, 3]")
            return Base(place, ["--version", "a word"])

        def base(self, variant):
            place = self.folder / "only"
            if not place.exists():
                place.mkdir(parents=True)
            return self.make(variant, place)

        def outcome(self, base, place, result):
            return None

        def editable(self, base, place):
            return [place / "a.json"]

        def judge(self, base, place, result, changed):
            return Verdict("same") if (place / "a.json").read_bytes() == b"[1, 2, 3]" else other("not as it was")

    kind = Never(tmp_path / "work", tmp_path, Values(0))
    campaign = Campaign([kind], 0, tmp_path / "work", tmp_path / "found")
    campaign.run(seconds=60, inputs=4)
    (kept,) = (tmp_path / "found").iterdir()
    assert kept.name == "never-not-as-it-was"
    assert (kept / "a.json").exists()
    assert "python -m pretrain --version 'a word'" in (kept / "command.sh").read_text()
    assert re.search(r"input 0: only\na.json: ", (kept / "what.txt").read_text())
    assert campaign.found == {("never", "not as it was"): list(range(4))}
    assert campaign.table().splitlines()[1].split() == ["never", "4", *"000000", "4"]
