"""Edited checkpoints: each is passed over for the one before, with the reason, or is a mistake of one line; none ends in a
traceback, and none in another result."""

import json
import random
import shutil

import pytest
import torch

from pretrain.checkpoint.config import CheckpointConfig
from pretrain.checkpoint.marker import MARKER, incomplete_reason
from pretrain.checkpoint.store import KINDS, CheckpointStore, load
from pretrain.runtime.errors import UserError
from tests.damage import (
    as_format_3,
    drop,
    edit_header,
    edit_marker,
    edit_pieces,
    edit_state,
    edit_tensors,
    flip,
    folder,
    forge,
    from_another,
    in_two,
    pipe,
    put,
    random_edit,
    remove,
    set_at,
    swap_text,
    truncate,
)
from tests.runs import assert_same_run

W, O = "model.safetensors", "optimizer.safetensors"  # noqa: E741
NORM = "model.norm.weight"
DEEP = "[" * 200_000

AS_IT_IS = {  # the marker is what it was → what is said
    "a flipped bit in the marker": (flip(MARKER), MARKER),
    "a flipped bit in a name of the marker": (
        swap_text(MARKER, '"optimizer.s', '"optimizes.s'),
        "does not match its checksum",
    ),
    "the optimizer's entry taken out": (edit_marker(lambda m: m["files"].pop(O)), "does not match its checksum"),
    "an entry twice": (swap_text(MARKER, '"config.json": {', '"state.json": {'), "is duplicated"),
    "no checksum of itself": (edit_marker(lambda m: m.pop("xxh3_128")), "does not match its checksum"),
    "another format": (edit_marker(lambda m: m.update(format=5)), "format 5, this version reads 3 to 4"),
    "an older format": (edit_marker(lambda m: m.update(format=3)), "does not match its checksum"),
    "a marker that is no object": (put(MARKER, "[]"), f"unreadable {MARKER}"),
    "an empty marker": (put(MARKER, ""), f"unreadable {MARKER}"),
    "a deep marker": (put(MARKER, DEEP), "nested too deep"),
    "a marker of NUL": (put(MARKER, b"\0" * 100), f"unreadable {MARKER}"),
    "a size that is no number": (edit_marker(lambda m: m["files"][O].update(bytes="1")), "should be a valid integer"),
    "a pipe for a marker": (pipe(MARKER), f"no {MARKER}"),
    "a folder for a marker": (folder(MARKER), f"no {MARKER}"),
    "a flipped bit in state.json": (flip("state.json"), "state.json does not match its checksum"),
    "a flipped bit in the weights": (flip(W, -9), f"{W} does not match its checksum"),
    "a flipped bit in a header": (flip(W, 9), W),
    "moments of another step": (from_another(O), f"{O} does not match its checksum"),
    "weights of another step": (from_another(W), f"{W} does not match its checksum"),
    "moments cut off": (truncate(O), f"{O} has"),
    "weights gone": (remove(W), f"{W} is missing"),
    "a pipe for weights": (pipe(W), f"{W} is missing"),
    "a folder for state.json": (folder("state.json"), "state.json is missing"),
    "a small file changed": (put("README.md", "other"), "README.md has"),
}
FORGED = {  # the marker fits what lies there → what is said
    "state.json is no object": (put("state.json", "[]"), "state.json can't be read"),
    "state.json is empty": (put("state.json", "{}"), "state.json can't be read"),
    "state.json is deep": (put("state.json", DEEP), "nested too deep"),
    "state.json has a key twice": (
        swap_text("state.json", '"loader": {', '"progress": {}, "loader": {'),
        "is duplicated",
    ),
    "no progress": (drop("progress"), "progress"),
    "no step": (drop("progress.step"), "no step"),
    "a step that is no number": (set_at("progress.step", "4"), "progress.step"),
    "a step below zero": (set_at("progress.step", -1), "progress.step"),
    "a huge step": (set_at("progress.step", 10**400), "progress.step"),
    "a step that is NaN": (set_at("progress.step", float("nan")), "progress.step"),
    "the step of another folder": (set_at("progress.step", 3), "state.json belongs to step 3"),
    "a key of nobody's": (set_at("progress.weights", 1), "unknown key 'weights'"),
    "a baseline of words": (set_at("progress.baseline", {"d": "low"}), "progress.baseline"),
    "scores without a domain": (set_at("progress.scores", [{}]), "progress.scores"),
    "another cursor": (set_at("loader.samples", 3), "loader is at sample 3"),
    "no cursor": (set_at("loader", None), "loader"),
    "no random state": (set_at("rng", []), "rng"),
    "a random state more": (
        edit_state(lambda s: s["rng"].append(s["rng"][0])),
        "rng has the states of 2 processes, but 1 saved",
    ),
    "a broken random state": (set_at("rng.0.torch", "AAAA"), "rng.0"),
    "a random state beyond its end": (set_at("rng.0.numpy.2", 10**6), "rng.0"),
    "a short random state": (set_at("rng.0.python.1", [1, 2]), "rng.0"),
    "no scaler": (drop("scaler"), "scaler"),
    "a scaler that is half there": (set_at("scaler.scale", 2.0), "scaler"),
    "a guard of words": (set_at("guard.losses", ["low"]), "guard.losses"),
    "no identity": (drop("identity"), "identity"),
    "a sequence of no length": (set_at("identity.sequence_length", 0), "identity.sequence_length"),
    "records that are none": (set_at("records", [5]), "records"),
    "records without a step": (set_at("records", [{"event": "train"}]), "records"),
    "the moments' file gone": (remove(O), "is missing"),
    "the weights' file gone": (remove(W), "no weights"),
    "one parameter's moments gone": (
        edit_tensors(O, lambda t, m: [t.pop(f"{NORM}/{k}") for k in ("exp_avg", "exp_avg_sq", "step")]),
        f"optimizer: '{NORM}/exp_avg' is missing",
    ),
    "one moment gone": (edit_tensors(O, lambda t, m: t.pop(f"{NORM}/exp_avg_sq")), f"'{NORM}/exp_avg_sq' is missing"),
    "a moment of no weight": (edit_tensors(O, lambda t, m: t.update({"x/step": torch.zeros(())})), "was not saved"),
    "a weight gone": (edit_tensors(W, lambda t, m: t.pop(NORM)), f"model: '{NORM}' is missing"),
    "a weight of another shape": (
        edit_tensors(W, lambda t, m: t.update({NORM: t[NORM].reshape(2, 16)})),
        f"{NORM} is float32 [2, 16], float32 [32] was saved",
    ),
    "a weight of another type": (
        edit_tensors(W, lambda t, m: t.update({NORM: t[NORM].half()})),
        f"{NORM} is float16 [32]",
    ),
    "a header that lies": (edit_header(W, lambda h: h[NORM].update(shape=[33])), f"{W} can't be read"),
    "a header of an unknown type": (edit_header(W, lambda h: h[NORM].update(dtype="F99")), f"{W} can't be read"),
    "a huge shape": (edit_header(W, lambda h: h[NORM].update(shape=[2**70])), f"{W} can't be read"),
    "pieces of no file": (edit_tensors(W, lambda t, m: m.update(pieces='{"x": [0, [1]]}')), "x is not in it"),
    "pieces that are no JSON": (edit_tensors(W, lambda t, m: m.update(pieces="{")), f"{W} can't be read"),
    "pieces that are a list": (edit_tensors(W, lambda t, m: m.update(pieces="[]")), "pieces"),
    "deep pieces": (edit_tensors(W, lambda t, m: m.update(pieces=DEEP)), "nested too deep"),
}
R0, R1 = "model.rank-0.safetensors", "model.rank-1.safetensors"
SHARDED = {  # of two processes; the marker fits what lies there → what is said
    "a rank's weights gone": (remove(R1), "rows"),
    "a rank's moments gone": (remove("optimizer.rank-1.safetensors"), "rows"),
    "a piece that overlaps": (edit_pieces(R1, lambda p: p[NORM].__setitem__(0, 8)), "there twice"),
    "a piece beyond a gap": (edit_pieces(R1, lambda p: p[NORM].__setitem__(0, 20)), "missing"),
    "a piece before the first": (edit_pieces(R1, lambda p: p[NORM].__setitem__(0, -16)), "pieces"),
    "a piece of a larger whole": (edit_pieces(R1, lambda p: p[NORM].__setitem__(1, [64])), "another dtype or shape"),
    "a piece of no shape": (edit_pieces(R0, lambda p: p[NORM].__setitem__(1, None)), "pieces"),
    "a piece of one number": (edit_pieces(R0, lambda p: p.update({NORM: 7})), "pieces"),
    "both ranks the same": (lambda c: shutil.copy(c / R0, c / R1), "there twice"),
    "a random state less": (edit_state(lambda s: s["rng"].pop()), "rng has the states of 1 processes, but 2 saved"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tmp_path_factory.mktemp("made")


@pytest.fixture
def run(base_arguments, made, command):
    """A run with the checkpoints of steps 2 and 4."""
    if not (made / "run").exists():
        few = ["max_steps=4", "save_every=2", "evaluate_every=2", "sink=jsonl", "evaluation.samples=0"]
        code, _, err = command([*base_arguments, *few, f"output_dir={made / 'run'}"])
        assert code == 0, err
    return made / "run"


@pytest.fixture
def store(run, tmp_path):
    """A copy of its checkpoints."""
    return CheckpointStore(shutil.copytree(run / "checkpoints", tmp_path / "checkpoints"))


def assert_passed_over(store, says, capsys):
    before = {p: p.stat().st_size for p in store.path(4).rglob("*")}
    capsys.readouterr()
    assert store.newest() == store.path(2)
    said = capsys.readouterr().err
    assert said.startswith(f"checkpoint {store.path(4)} skipped: ")
    assert says in said
    assert said.count("\n") == 1
    assert {p: p.stat().st_size for p in store.path(4).rglob("*")} == before, "it stays for people to look at"
    with pytest.raises(UserError, match="not a complete checkpoint"):
        load(store.path(4))


@pytest.mark.parametrize("name", AS_IT_IS)
def test_damage_that_the_marker_does_not_know(name, store, capsys):
    edit, says = AS_IT_IS[name]
    edit(store.path(4))
    assert_passed_over(store, says, capsys)


@pytest.mark.parametrize("name", FORGED)
def test_damage_that_the_marker_believes(name, store, capsys):
    edit, says = FORGED[name]
    edit(store.path(4))
    forge(store.path(4))
    assert_passed_over(store, says, capsys)


@pytest.mark.parametrize("name", SHARDED)
def test_damage_of_shards(name, store, capsys):
    edit, says = SHARDED[name]
    for step in (2, 4):
        in_two(store.path(step))
    assert store.newest() == store.path(4)
    edit(store.path(4))
    forge(store.path(4))
    assert_passed_over(store, says, capsys)


def test_shards_are_the_whole(store):
    """What the tests above begin with is a checkpoint indeed."""
    expected = load(store.path(4))["engine"]
    weights = {kind: {n: expected[kind].read(n) for n in sorted(expected[kind].keys())} for kind in KINDS}
    in_two(store.path(4))
    found = load(store.path(4))["engine"]
    for kind in KINDS:
        assert found[kind].keys() == weights[kind].keys()
        assert all(torch.equal(found[kind].read(n), t) for n, t in weights[kind].items())


def test_the_format_before_is_read(store):
    expected = load(store.path(4))
    as_format_3(store.path(4))
    assert "tensors" not in json.loads((store.path(4) / "state.json").read_text())
    assert store.newest() == store.path(4)
    found = load(store.path(4))
    assert {k: v for k, v in found.items() if k != "engine"} == {k: v for k, v in expected.items() if k != "engine"}


def test_without_a_list_of_tensors_there_must_be_moments(store, capsys):
    """Format 3 does not say what was saved; that a trained step has left moments is known all the same."""
    (store.path(4) / O).unlink()
    as_format_3(store.path(4))
    assert_passed_over(store, "no optimizer state, after 4 steps", capsys)


@pytest.mark.parametrize("seed", range(60))
def test_any_edit(seed, store):
    """Drawn at random: no exception, and where the checkpoint is used it is what it was but for what nobody can know."""
    what = random_edit(store.path(4), random.Random(seed))
    newest = store.newest()
    assert newest in (store.path(2), store.path(4)), what
    load(newest)


def test_files_of_another_step_show_in_large_files(store, monkeypatch, capsys):
    """Of large files the quick look reads a few places: enough to tell two steps apart, at the same size and shapes."""
    monkeypatch.setattr("pretrain.checkpoint.marker.SMALL_BYTES", 1000)
    monkeypatch.setattr("pretrain.checkpoint.marker.SAMPLE_BYTES", 64)
    forge(store.path(4))
    assert "quick_xxh3_128" in json.loads((store.path(4) / MARKER).read_text())["files"][O]
    assert store.newest() == store.path(4)
    from_another(O)(store.path(4))
    assert_passed_over(store, f"{O} does not match its checksum", capsys)


def test_small_files_are_compared_by_their_bytes(store):
    """With checkpoint.verify=size, which is the default: all but large weights."""
    path = store.path(4)
    assert CheckpointConfig().verify == "size"
    for name in ("config.json", "config.yaml", "state.json", "tokenizer.json", W, O):
        flip(name)(path)
        assert f"{name} " in incomplete_reason(path)
        flip(name)(path)
        assert incomplete_reason(path) is None


def test_a_run_continues_from_the_one_before(run, base_arguments, command, tmp_path):
    """From the command line to the same end: the entry of the moments is taken out, marker and all."""
    copy = shutil.copytree(run, tmp_path / "run")
    newest = copy / "checkpoints/step-00000004"
    (newest / O).unlink()
    forge(newest)
    few = ["max_steps=4", "save_every=2", "evaluate_every=2", "sink=jsonl", "evaluation.samples=0"]
    code, _, err = command([*base_arguments, *few, f"output_dir={copy}"])
    assert code == 0, err
    assert f"{newest} skipped: optimizer: " in err
    for kind in KINDS:
        ours, theirs = (load(r / "checkpoints/step-00000004")["engine"][kind] for r in (copy, run))
        assert all(torch.equal(ours.read(n), theirs.read(n)) for n in theirs.keys() | ours.keys())


def test_a_named_one_that_is_damaged_is_a_mistake(run, base_arguments, command, tmp_path):
    named = shutil.copytree(run / "checkpoints/step-00000004", tmp_path / "step-00000004")
    edit_tensors(O, lambda t, m: t.pop(f"{NORM}/exp_avg"))(named)
    forge(named)
    code, _, err = command([*base_arguments, f"resume={named}", f"output_dir={tmp_path / 'run'}"])
    assert code == 2
    assert err.strip().splitlines()[-1].startswith(f"error: resume={named}: not a complete checkpoint: optimizer: ")
    assert "Traceback" not in err


def test_moments_that_format_3_lost_do_not_start_anew(run, base_arguments, command, tmp_path):
    """Only the model knows which parameters should have some; by then the run has been built, and it ends."""
    copy = shutil.copytree(run, tmp_path / "run")
    newest = copy / "checkpoints/step-00000004"
    edit_tensors(O, lambda t, m: [t.pop(f"{NORM}/{k}") for k in ("exp_avg", "exp_avg_sq", "step")])(newest)
    as_format_3(newest)
    code, _, err = command([*base_arguments, "max_steps=6", f"output_dir={copy}", "sink=jsonl"])
    assert code == 2
    assert f"error: the checkpoint has no optimizer state for 1 parameters, e.g. {NORM}" in err
    assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", *(f"deepspeed strategy.zero_stage={n}" for n in range(4))])
def test_under_every_strategy(strategy, base_arguments, spawn, tmp_path):
    """Of two processes: the newest lacks a moment, marker and all; the run ends as it had ended."""
    given = [*base_arguments, *f"strategy={strategy}".split(), "devices=2", "batch_size=1", "checkpoint.keep_last=4"]

    def train():
        process = spawn([*given, f"output_dir={tmp_path / 'run'}"])
        out, _ = process.communicate(timeout=240)
        assert process.returncode == 0, out
        return out

    train()
    expected = shutil.copytree(tmp_path / "run", tmp_path / "expected")
    newest = tmp_path / "run/checkpoints/step-00000020"
    file = sorted(newest.glob("optimizer*.safetensors"))[0].name
    edit_tensors(file, lambda t, m: t.pop(sorted(n for n in t if n.endswith("/exp_avg"))[0]))(newest)
    forge(newest)
    assert "skipped: " in train()
    assert_same_run(tmp_path / "run", expected)
