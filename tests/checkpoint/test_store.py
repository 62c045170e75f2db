"""A checkpoint is whole or absent, reads back bit for bit, and an older one survives whatever happens to a newer one."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pretrain.checkpoint.atomic import write_folder
from pretrain.checkpoint.config import CheckpointConfig
from pretrain.checkpoint.marker import incomplete_reason
from pretrain.checkpoint.rng import rng_state, seed_everything, set_rng_state
from pretrain.checkpoint.schema import read_state, validation_error
from pretrain.checkpoint.store import CheckpointStore, bytes_of, load
from pretrain.checkpoint.writer import AsyncCheckpointWriter
from pretrain.distributed.context import DistributedContext
from pretrain.distributed.sharding import TensorShard, manifest
from pretrain.models.hub.files import weight_files
from pretrain.runtime.errors import UserError
from pretrain.runtime.folders import MARKER
from tests.damage import edit_state, forge

ALONE = DistributedContext()


def state(seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    weights = {"w": torch.randn(5, 3, generator=generator), "b": torch.randn(3, generator=generator).bfloat16()}
    moments = {"w/exp_avg": torch.randn(5, 3, generator=generator), "w/step": torch.tensor(float(seed))}
    pieces = [{name: TensorShard(t, 0, tuple(t.shape)) for name, t in named.items()} for named in (weights, moments)]
    scaler = {"scale": 2.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 3}
    engine = {"model": pieces[0], "optimizer": pieces[1], "scaler": scaler}
    identity = dict.fromkeys(("model", "tokenizer", "data", "weights"), "x") | {"seed": 0, "optimizer": []}
    return {
        "engine": engine | {"tensors": {"model": manifest(weights), "optimizer": manifest(moments)}},
        "identity": identity | {"sequence_length": 8, "global_batch": 2},
        "loader": {"samples": seed},
        "progress": {"step": seed, "samples": seed, "tokens": 7, "baseline": {"d": 1.5}},
        "rng": [rng_state()],
    }


def saved_at(store: CheckpointStore, step: int, what: dict) -> Path:
    store.save(step, what, world=ALONE)
    return store.path(step)


def test_reads_back_bit_for_bit(tmp_path):
    saved = state(3)
    loaded = load(saved_at(CheckpointStore(tmp_path), 3, saved))
    for part in ("model", "optimizer"):
        assert loaded["engine"][part].keys() == saved["engine"][part].keys()
        for name, piece in saved["engine"][part].items():
            assert loaded["engine"][part].read(name).dtype == piece.tensor.dtype
            assert torch.equal(loaded["engine"][part].read(name), piece.tensor)
    assert {k: v for k, v in loaded.items() if k != "engine"} == {k: v for k, v in saved.items() if k != "engine"}
    assert loaded["engine"]["scaler"] == saved["engine"]["scaler"]


def with_hook(step: int) -> dict:
    """A state with a hook `ema`, which keeps tensors and plain values."""
    saved, averages = state(step), {"ema/w": torch.full((5, 3), float(step)), "ema/count": torch.tensor(step)}
    saved["engine"]["hook"] = {name: TensorShard(t, 0, tuple(t.shape)) for name, t in averages.items()}
    saved["engine"]["tensors"]["hook"] = manifest(averages)
    return saved | {"hooks": {"ema": {"decay": 0.5, "warm": [1, None]}}}


@pytest.mark.parametrize("background", [False, True])
def test_what_hooks_keep_comes_back(background, tmp_path):
    writer = AsyncCheckpointWriter(CheckpointStore(tmp_path), world=ALONE, background=background)
    saved = with_hook(3)
    assert writer.save(3, saved, at_once=False)
    writer.wait()
    path = tmp_path / "step-00000003"
    loaded = load(path)
    assert loaded["hooks"] == {"ema": {"decay": 0.5, "warm": [1, None]}}
    assert loaded["engine"]["hook"].keys() == {"ema/w", "ema/count"}
    assert torch.equal(loaded["engine"]["hook"].read("ema/w"), torch.full((5, 3), 3.0))
    assert bytes_of(saved) == bytes_of(state(3)) + 5 * 3 * 4 + 8


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: (path / "hook.safetensors").unlink(), "hook: 'ema/count' is missing"),
        (
            lambda path: save_file(
                {"ema/w": torch.zeros(5, 3), "ema/count": torch.tensor(3.0)}, path / "hook.safetensors"
            ),
            "hook: ema/count is float32 [], int64 [] was saved",
        ),
        (edit_state(lambda state: state.update(hooks={"ema": 5})), "hooks.ema: input should be an object"),
        (edit_state(lambda state: state["tensors"].pop("hook")), "hook: 'ema/count' was not saved"),
    ],
    ids=["no file", "another dtype", "no values", "not listed"],
)
def test_damaged_hooks_are_noticed(damage, says, tmp_path):
    path = saved_at(CheckpointStore(tmp_path), 3, with_hook(3))
    damage(path)
    forge(path)
    assert says in validation_error(path)


def test_newest_passes_over_what_is_torn_and_says_why(tmp_path, capsys):
    store = CheckpointStore(tmp_path, CheckpointConfig(keep_last=None))
    for step in (1, 2, 3, 4):
        store.save(step, state(step), world=ALONE)
    (tmp_path / "step-00000004" / MARKER).unlink()
    weights = tmp_path / "step-00000003" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert store.newest() == tmp_path / "step-00000002"
    said = capsys.readouterr().err
    assert "step-00000004 skipped: no COMPLETE.json" in said
    assert "step-00000003 skipped: model.safetensors has" in said
    assert store.steps() == [1, 2, 3, 4], "nothing is deleted"
    with pytest.raises(UserError, match="not a complete checkpoint"):
        load(tmp_path / "step-00000003")


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def test_one_that_a_kill_kept_from_being_replaced_is_put_back(tmp_path):
    store = CheckpointStore(tmp_path)
    path = saved_at(store, 3, state(3))
    path.rename(path.with_name(f"{path.name}.replaced"))
    assert store.newest() == path
    assert load(path)["progress"]["step"] == 3


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: (path / "optimizer.safetensors").unlink(), "optimizer.safetensors is missing"),
        (
            lambda path: (path / MARKER).write_text('{"format": 99, "files": {}}'),
            "format 99, this version reads 3 to 4",
        ),
    ],
    ids=["a missing file", "another version"],
)
def test_the_one_before_is_used_and_the_reason_said(damage, reason, tmp_path, capsys):
    store = CheckpointStore(tmp_path)
    saved_at(store, 1, state(1))
    damage(saved_at(store, 2, state(2)))
    assert store.newest() == store.path(1)
    assert f"{store.path(2)} skipped: {reason}" in capsys.readouterr().err


def test_what_the_marker_does_not_name_is_not_read(tmp_path):
    saved = state(1)
    path = saved_at(CheckpointStore(tmp_path), 1, saved)
    for name in ("model.rank-7.safetensors", "model copy.safetensors", "optimizer.rank-1.safetensors"):
        shutil.copy(path / f"{name[: name.index('.')].split()[0]}.safetensors", path / name)
    loaded = load(path)["engine"]
    for kind in ("model", "optimizer"):
        for name, piece in saved["engine"][kind].items():
            assert torch.equal(loaded[kind].read(name), piece.tensor), name
    assert weight_files(path, "m") == [path / "model.safetensors"]


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """What is flushed and renamed, in order, by its path below ``tmp_path``."""
    seen, fsync, rename = [], os.fsync, os.rename

    def below(path):
        return os.path.relpath(path, tmp_path)

    def flushed(handle):
        seen.append(f"flush {below(os.readlink(f'/proc/self/fd/{handle}'))}")
        fsync(handle)

    def renamed(old, new):
        seen.append(f"rename {below(old)} {below(new)}")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "rename", renamed)
    return seen


def test_the_order_in_which_it_reaches_the_disk(calls, tmp_path):
    """A machine that loses power at any moment has the old checkpoint or the new one: files, marker, folders, the name,
    and only then the old one goes."""
    store = CheckpointStore(tmp_path / "run/checkpoints", CheckpointConfig(keep_last=1), {"code/model.py": b"pass"})
    saved_at(store, 1, state(1))
    assert calls[:2] == ["flush .", "flush run"], "the folders that it makes on the way"
    calls.clear()
    saved_at(store, 2, state(2))
    here = "run/checkpoints"
    new = f"{here}/step-00000002.partial"
    names = ["model.safetensors", "optimizer.safetensors", "state.json", "code/model.py", MARKER, "code"]
    assert calls == [
        *(f"flush {new}/{name}" for name in names),
        f"flush {new}",
        f"rename {new} {here}/step-00000002",
        f"flush {here}",
        f"rename {here}/step-00000001 {here}/step-00000001.removed",
    ]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_flipped_byte_is_found_and_named(name, tmp_path, capsys):
    store = CheckpointStore(tmp_path, CheckpointConfig(verify="full"))
    saved_at(store, 1, state(1))
    flip(saved_at(store, 2, state(2)) / name, -3)
    assert incomplete_reason(store.path(2), verify="full") == f"{name} does not match its checksum"
    assert store.newest() == store.path(1)
    assert f"step-00000002 skipped: {name} does not match" in capsys.readouterr().err


def test_the_quick_look_reads_small_files_and_headers_only(tmp_path, monkeypatch):
    """A large file is known by its size; what is in its middle only the checksum tells."""
    path = saved_at(CheckpointStore(tmp_path), 1, state(1))
    monkeypatch.setattr("pretrain.checkpoint.marker.SMALL_BYTES", 0)
    flip(path / "model.safetensors", -3)
    assert incomplete_reason(path) is None
    assert incomplete_reason(path, verify="full") is not None
    flip(path / "model.safetensors", 9)
    assert "model.safetensors can't be read" in incomplete_reason(path)


@pytest.mark.parametrize(
    "damage", ["{", "[]", '{"format": 3}', '{"format": 99, "files": {}}', '{"format": 3, "files": {"state.json": 5}}']
)
def test_a_marker_that_makes_no_sense_is_no_marker(tmp_path, damage):
    path = saved_at(CheckpointStore(tmp_path), 1, state(1))
    (path / MARKER).write_text(damage)
    assert incomplete_reason(path) is not None


def test_keep_last_counts_whole_ones_only(tmp_path):
    store = CheckpointStore(tmp_path, CheckpointConfig(keep_last=2))
    for step in (1, 2, 3):
        store.save(step, state(step), world=ALONE)
    assert store.steps() == [2, 3]
    (tmp_path / "step-00000003" / MARKER).unlink()
    store.save(4, state(4), world=ALONE)
    assert store.steps() == [2, 3, 4], "2 and 4 are the two whole ones; 3 is not ours to delete"


def written(file: Path, text: str) -> list[Path]:
    file.write_text(text)
    return [file]


def test_an_error_while_writing_leaves_the_older_folder(tmp_path):
    target = tmp_path / "model"
    write_folder(target, lambda fresh: written(fresh / "a", "old"), world=ALONE, hint=str)

    def fail(fresh):
        (fresh / "a").write_text("new")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_folder(target, fail, world=ALONE, hint=str)
    assert (target / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert sorted(p.name for p in target.iterdir()) == [MARKER, "a"]


def test_a_place_that_cannot_be_written_names_the_last_good_one(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints")
    good = saved_at(store, 1, state(1))
    (tmp_path / "checkpoints" / "step-00000002.partial").write_text("a file where the folder has to be")
    with pytest.raises(UserError, match=f"the last valid checkpoint is {good}"):
        store.save(2, state(2), world=ALONE)
    assert store.newest() == good


def test_json_state_has_no_code_in_it(tmp_path):
    path = saved_at(CheckpointStore(tmp_path), 1, state(1))
    assert {p.suffix for p in path.iterdir()} == {".json", ".safetensors"}
    assert json.loads((path / "state.json").read_text())["progress"]["baseline"] == {"d": 1.5}


def test_rng_goes_on_with_the_next_number():
    import random

    import numpy as np

    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), float(np.random.randn()), float(torch.randn(()))]

    seed_everything(7)
    draw()
    saved = json.loads(json.dumps(rng_state()))
    expected = draw()
    seed_everything(8)
    set_rng_state(saved)
    assert draw() == expected


def test_half_written_folders_are_no_checkpoints(tmp_path):
    store = CheckpointStore(tmp_path, CheckpointConfig(keep_last=None))
    path = saved_at(store, 1, state(1))
    shutil.copytree(path, tmp_path / "step-00000002.partial")
    assert store.steps() == [1]


def test_what_is_beyond_a_step_is_set_aside_and_nothing_else(tmp_path, capsys):
    """The step itself stays: the run resumes from it."""
    store = CheckpointStore(tmp_path, CheckpointConfig(keep_last=None))
    for step in (1, 2, 3, 4):
        store.save(step, state(step), world=ALONE)
    store.archive_after(2)
    assert store.steps() == [1, 2]
    aside = sorted(p.name.rpartition("-")[0] for p in tmp_path.glob("set-aside-*"))
    assert aside == ["set-aside-step-00000003", "set-aside-step-00000004"]
    assert capsys.readouterr().err.count("belongs to a branch that was abandoned: kept as set-aside-step-0000000") == 2
    store.archive_after(-1)
    assert store.steps() == []
    assert store.newest() is None


@pytest.mark.parametrize("target", ["step-00000002", "nowhere"])
def test_a_link_in_the_place_of_a_checkpoint_is_set_aside(target, tmp_path):
    """Also one that leads to itself."""
    store = CheckpointStore(tmp_path, CheckpointConfig(keep_last=None))
    store.save(1, state(1), world=ALONE)
    store.path(2).symlink_to(target)
    assert store.newest() == store.path(1)
    store.archive_after(1)
    assert store.steps() == [1]
    (aside,) = tmp_path.glob("set-aside-*")
    assert aside.is_symlink()


@pytest.mark.parametrize(
    ("saved", "read"),
    [
        ("0123456789abcdef", "0123456789abcdef"),
        ("my models/a {b} 0123456789abcdef", "0123456789abcdef"),
        ('0123456789abcdef {"rope_scaling": {"factor": 2.0}}', '0123456789abcdef {"rope_scaling": {"factor": 2.0}}'),
    ],
    ids=["digest", "name and digest of earlier versions", "overrides"],
)
def test_the_identity_of_a_model_is_read_as_it_was_saved(tmp_path, saved, read):
    folder = saved_at(CheckpointStore(tmp_path), 1, state(1))
    edit_state(lambda content: content["identity"].update(model=saved))(folder)
    assert read_state(folder)["identity"]["model"] == read
