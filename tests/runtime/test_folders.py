"""A name that a file or a config gives does not lead out of its folder; a folder that others can change is named."""

import json
import os
import shutil
import stat
from types import SimpleNamespace

import pytest

from pretrain.checkpoint.marker import incomplete_reason, write_marker
from pretrain.data.sources.local import Local
from pretrain.models.hub.files import weight_files
from pretrain.runtime.errors import UserError
from pretrain.runtime.folders import check_private
from tests.cli.test_cli import assert_mistake

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
    assert "outside the folder" in str(incomplete_reason(folder))


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


@pytest.mark.parametrize(
    ("name", "more"),
    [*((name, []) for name in THEIRS), ("config.yaml", ["resume=never"]), ("metrics.jsonl", ["task=evaluation"])],
)
def test_files_of_somebody_elses_are_not_replaced(name, more, command, base_arguments, tmp_path):
    """Names alone do not make a run: what no command of this program has left is not ours to replace or to move. The
    first refusal leaves nothing that would make it one."""
    file = tmp_path / "run" / name
    file.parent.mkdir(parents=True)
    file.write_text("x")
    for _ in range(2 if name in ("model/precious", "config.yaml", "metrics.jsonl") else 1):
        given = [*base_arguments, f"output_dir={tmp_path / 'run'}", *more]
        assert_mistake(
            command(given),
            f"{name if name.startswith('.') else name.partition('/')[0]} in it was not written by a run and would be replaced",
        )
    assert file.read_text() == "x"
    assert os.listdir(tmp_path) == ["run"]


def test_a_domain_is_text_in_the_report():
    from pretrain.telemetry.history import History
    from pretrain.telemetry.report.folder import Run
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


LINKS = [
    ".run_id",
    ".lock",
    ".hydra",
    ".hydra/config.yaml",
    ".hydra/overrides.yaml",
    "logs",
    "logs/rank-0.log",
    "config.yaml",
]
LINKS += ["checkpoints", "models", "metrics.jsonl", "run.json", "report.html", "train.csv", "tensorboard", "data.json"]
LINKS += ["quarantine.jsonl"]
SHARED_BY_TASKS = (".lock", "config.yaml", "logs/rank-0.log")


@pytest.mark.parametrize(
    ("name", "leads"),
    [
        *((name, "nowhere") for name in LINKS),
        ("logs/rank-0.log", "to a file"),
        (".hydra", "to a folder"),
        ("logs", "to a folder"),
    ],
)
def test_nothing_is_written_through_a_link(name, leads, command, base_arguments, tmp_path):
    """Put into a folder that others could write, before the run: what it leads to stays as it is."""
    run, target = tmp_path / "run", tmp_path / "elsewhere"
    if leads == "to a file":
        target.write_text("alias ls=ls\n")
    elif leads == "to a folder":
        target.mkdir()
    (run / name).parent.mkdir(parents=True)
    (run / ".run_id").touch()
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(target)
    given = [*base_arguments, f"output_dir={run}", "max_steps=1", "sink=[jsonl,csv,tensorboard]"]
    for more in ([], ["task=generation"]) if name in SHARED_BY_TASKS else ([],):
        outcome = command([*given, *more])
        assert_mistake(outcome, f"output_dir={run}: ")
        assert f"a link to {target}" in outcome[2]
    assert not target.exists() if leads == "nowhere" else True
    assert not target.is_dir() or not list(target.iterdir())
    assert not target.is_file() or target.read_text() == "alias ls=ls\n"
    assert sorted(os.listdir(tmp_path)) == sorted({"run", *(["elsewhere"] if target.exists() else [])})


@pytest.mark.parametrize("name", ["logs/rank-0.log", "metrics.jsonl", ".run_id", "config.yaml"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(name, command, base_arguments, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / name)
    assert_mistake(command([*base_arguments, f"output_dir={tmp_path}"]), f"{name} in it is neither a file nor a folder")


def test_a_hard_link_is_written_under_one_name(command, base_arguments, tmp_path):
    """As `cp -al` makes a backup of a run: the run continues in a copy, the backup stays as it is."""
    run, backup = tmp_path / "run", tmp_path / "backup"
    given = [
        *base_arguments,
        f"output_dir={run}",
        "sink=[jsonl,csv]",
        "evaluation.samples=0",
        "checkpoint.export=never",
    ]
    assert command([*given, "max_steps=1"])[0] == 0
    shutil.copytree(run, backup, copy_function=os.link)
    before = {f: f.read_bytes() for f in backup.rglob("*") if f.is_file() and f.name != ".lock"}
    assert command([*given, "max_steps=2"])[0] == 0
    assert {f: f.read_bytes() for f in before} == before
    assert (run / "metrics.jsonl").read_bytes().startswith(before[backup / "metrics.jsonl"][:200])


def test_output_dir_and_what_is_above_it_may_be_links(command, base_arguments, tmp_path):
    """The usual way to another disk."""
    (tmp_path / "scratch/me").mkdir(parents=True)
    (tmp_path / "outputs").symlink_to(tmp_path / "scratch/me")
    given = [*base_arguments, f"output_dir={tmp_path}/outputs/run", "sink=jsonl", "evaluation.samples=0"]
    for steps in (1, 2):
        code, _, err = command([*given, f"max_steps={steps}"])
        assert code == 0, err
    assert (tmp_path / "scratch/me/run/checkpoints/step-00000002").is_dir()


@pytest.mark.parametrize("where", ["itself", "above", "behind a link", "above a link"])
@pytest.mark.parametrize("key", ["output_dir", "PRETRAIN_CACHE", "sweep_dir"])
def test_a_folder_that_everybody_can_change_is_refused(where, key, command, base_arguments, tmp_path, monkeypatch):
    place = tmp_path / "a/b"
    place.mkdir(parents=True)
    open_to_all = {
        "itself": place,
        "above": tmp_path / "a",
        "behind a link": place,
        "above a link": tmp_path / "links",
    }[where]
    if "link" in where:
        (tmp_path / "links").mkdir()
        (tmp_path / "links/x").symlink_to(place)
        place = tmp_path / "links/x"
    open_to_all.chmod(0o777)
    given = [*base_arguments, "max_steps=1", "sink=jsonl", "evaluation.samples=0"]
    if key == "PRETRAIN_CACHE":
        monkeypatch.setenv(key, str(place))
    elif key == "sweep_dir":
        given = ["-m", *given, "seed=1"]
    given.append(f"{key}={place}" if key != "PRETRAIN_CACHE" else f"output_dir={tmp_path / 'run'}")
    assert_mistake(command(given), f"{key}={place}: every user of this machine can write in {open_to_all}")
    assert not list((tmp_path / "a/b").iterdir())


@pytest.mark.parametrize("mode", [0o755, 0o700, 0o1777, 0o3777])
def test_a_folder_that_is_protected_is_fine(mode, tmp_path, capsys):
    """With the sticky bit nobody can replace what is another's, as in /tmp."""
    folder = tmp_path / "a"
    folder.mkdir()
    folder.chmod(mode)
    check_private(folder, "output_dir")
    assert capsys.readouterr().err == ""


def test_one_who_knows_may_share_a_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PRETRAIN_SHARED_FOLDERS", "1")
    (tmp_path / "a").mkdir()
    (tmp_path / "a").chmod(0o777)
    for _ in range(2):
        check_private(tmp_path / "a", "output_dir")
    assert capsys.readouterr().err.count("every user of this machine can write") == 1, "said once"


@pytest.mark.parametrize(("group", "members", "says"), [("me", [], ""), ("me", ["you"], "group"), ("lab", [], "group")])
def test_a_group_of_one_is_nobody_else(group, members, says, tmp_path, capsys, monkeypatch):
    """A umask of 002 makes folders for the group: on most systems the user's own. Of another it is said."""
    import grp
    import pwd

    folder = tmp_path / "a"
    folder.mkdir()
    folder.chmod(0o775)
    gid = folder.stat().st_gid
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: SimpleNamespace(pw_name="me", pw_gid=gid))
    monkeypatch.setattr(grp, "getgrgid", lambda gid: SimpleNamespace(gr_name=group, gr_mem=members))
    check_private(folder, "output_dir")
    assert ("can be changed by everybody in its group" in capsys.readouterr().err) == bool(says)


def test_a_folder_of_another_user_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    if tmp_path.stat().st_uid == 0:
        os.chown(tmp_path, 12345, -1)
    with pytest.raises(UserError, match=f"output_dir={tmp_path}: it belongs to another user"):
        check_private(tmp_path, "output_dir")


def test_folders_are_made_for_their_owner_whatever_the_umask(command, base_arguments, tmp_path):
    before = os.umask(0)
    try:
        code, _, err = command([*base_arguments, "max_steps=1", "sink=jsonl", f"output_dir={tmp_path / 'a/b/run'}"])
        assert code == 0, err
        code, _, err = command([*base_arguments, "max_steps=2", "sink=jsonl", f"output_dir={tmp_path / 'a/b/run'}"])
        assert code == 0, err
    finally:
        os.umask(before)
    assert not (tmp_path / "a/b/run").stat().st_mode & stat.S_IWOTH
