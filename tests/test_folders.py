"""A name that a file or a config gives does not lead out of its folder; a folder that others can change is named."""

import json
import os

import pytest

from pretrain.checkpoint.marker import missing_or_torn, write_marker
from pretrain.data.sources.local import Local
from pretrain.errors import UserError
from pretrain.folders import say_if_shared
from pretrain.models.files import weight_files
from tests.test_cli import assert_mistake

OUTSIDE = ["../out.safetensors", "sub/../../out.safetensors", "/etc/hostname"]


@pytest.mark.parametrize("name", ["..", ".", "...", "a/b", "../x", "a\\b", "a\tb"])
def test_the_name_of_a_run_is_no_path(name, command):
    assert_mistake(command([f'name="{name}"']), "name=")


@pytest.mark.parametrize("name", ["x", ".hidden", "a..b", "books-2", "Bücher 3"])
def test_other_names_are_fine(name, command):
    assert_mistake(command([f"name='{name}'", "lr=0"]), "lr=0")


def test_the_name_of_a_dataset_does_not_lead_out_of_outputs(command, base_arguments, tmp_path, monkeypatch):
    """It is part of the default output_dir."""
    monkeypatch.chdir(tmp_path)
    assert command([*base_arguments, "dataset.name=../../x/..", "max_steps=1", "sink=jsonl"])[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]
    assert len(list((tmp_path / "outputs").iterdir())) == 1


@pytest.mark.parametrize("name", OUTSIDE)
def test_weights_lie_in_the_models_folder(name, tmp_path):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "out.safetensors").write_bytes(b"weights of somebody else's")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match="outside the folder"):
        weight_files(folder, "m")


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_checkpoint_is_made_of_its_own_files(name, tmp_path):
    folder = tmp_path / "step-00000001"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "out.safetensors").write_bytes(b"12345678")
    size = os.path.getsize(folder / name)
    write_marker(folder, {name: {"bytes": size, "xxh3_128": "0" * 32}})
    assert "outside the folder" in str(missing_or_torn(folder))


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_saved_dataset_is_made_of_its_own_files(name, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(UserError, match="outside the folder"):
        Local(nameOrPath=str(folder)).files()
    (folder / "state.json").unlink()
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": [name]}))
    with pytest.raises(UserError, match="outside the folder"):
        Local(nameOrPath=str(folder)).files()


THEIRS = ["model/precious", "models/precious", "config.yaml", "data.json", "metrics.jsonl", "run.json", "report.html"]
THEIRS += ["quarantine.jsonl", "train.csv", ".hydra/config.yaml", "checkpoints/step-00000001/precious"]


@pytest.mark.parametrize("more", [[], ["resume=never"], ["task=evaluation"]], ids=" ".join)
@pytest.mark.parametrize("name", THEIRS)
def test_files_of_somebody_elses_are_not_replaced(name, more, command, base_arguments, tmp_path):
    """Names alone do not make a run: what no command of this program has left is not ours to replace or to move. Asked
    twice: the first refusal leaves nothing that would make it one."""
    file = tmp_path / "run" / name
    file.parent.mkdir(parents=True)
    file.write_text("x")
    for _ in range(2):
        given = [*base_arguments, f"output_dir={tmp_path / 'run'}", *more]
        assert_mistake(
            command(given),
            f"{name if name.startswith('.') else name.partition('/')[0]} in it is no run's and would be replaced",
        )
    assert file.read_text() == "x"
    assert os.listdir(tmp_path) == ["run"]


def test_a_domain_is_text_in_the_report():
    from pretrain.telemetry.report.folder import Run
    from pretrain.telemetry.report.history import History
    from pretrain.telemetry.report.page import run_page

    score = {
        "event": "evaluation",
        "role": "new",
        "loss": 1.0,
        "perplexity": 2.7,
        "bits_per_byte": 1.0,
        "delta_loss": 0.1,
    }
    records = [score | {"step": step, "domain": "<script>alert(1)</script>"} for step in (0, 1)]
    records.append({"event": "run_started", "step": 0, "time": 0, "name": "</title><script>"})
    assert "<script" not in run_page(Run("</title><script>", History(records)))


@pytest.mark.parametrize(
    ("mode", "says"), [(0o755, ""), (0o775, ""), (0o1777, ""), (0o777, "can be changed by every user")]
)
def test_a_folder_that_everybody_can_change_is_named(mode, says, tmp_path, capsys):
    folder = tmp_path / f"{mode:o}"
    folder.mkdir()
    folder.chmod(mode)
    say_if_shared(folder)
    say_if_shared(folder)
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == bool(says)


def test_a_folder_of_another_user_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    say_if_shared(tmp_path)
    assert "belongs to another user" in capsys.readouterr().err


def test_a_run_names_its_folder_and_its_cache(command, base_arguments, tmp_path, monkeypatch):
    run, cache = tmp_path / "run", tmp_path / "cache"
    for folder in (run, cache, run / "checkpoints"):
        folder.mkdir()
        folder.chmod(0o777)
    monkeypatch.setenv("PRETRAIN_CACHE", str(cache))
    code, _, err = command([*base_arguments, f"output_dir={run}", "max_steps=1", "sink=jsonl"])
    assert code == 0
    for folder in (run, cache, run / "checkpoints"):
        assert f"{folder} can be changed by every user" in err
