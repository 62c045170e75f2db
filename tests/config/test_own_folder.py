"""The folder of `--config-dir`: its choices in help and in messages, hostile names, sweeps."""

from pathlib import Path

import pytest

from pretrain.config.compose import run_config
from pretrain.runtime.errors import UserError


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["+ourlab=defalt"], "ourlab=defalt: no such choice; did you mean 'default'"),
        (["ourlab=defalt"], "ourlab=defalt: no such choice; did you mean 'default'"),
        (["ourlb.url=x"], "unknown key 'ourlb'"),
        (["optimizer=lin"], "optimizer=lin: no such choice; did you mean 'lion'"),
        (["transform=[adaptr]"], r"transform=adaptr: no such choice; did you mean 'adapter'"),
    ],
)
def test_the_nearest_name_of_their_folder(conf, words, message):
    with pytest.raises(UserError, match=message):
        run_config(words, conf)


@pytest.mark.parametrize(
    ("group", "text", "message"),
    [
        ("sink", "_target_: mylab.Lines\n", r"mine.yaml: its keys must be nested under a name, 'mine: {_target_: …}'"),
        ("hook", "decay: 0.9\n", r"mine.yaml: its keys must be nested under a name, 'mine: {_target_: …}'"),
        ("transform", "mine: {rank: 2}\n", r"transform/mine.yaml: mine has no _target_, the class"),
        (
            "optimizer",
            "lr: 0.1\n",
            r"optimizer/mine.yaml: has no _target_, the class or function that optimizer=mine stands",
        ),
        ("scheduler", "min_lr_ratio: 0.1\n", r"scheduler/mine.yaml: has no _target_"),
    ],
)
def test_a_file_that_is_no_part_is_named(conf, group, text, message):
    (Path(conf) / group).mkdir(exist_ok=True)
    (Path(conf) / group / "mine.yaml").write_text(f"# Mine.\n{text}")
    with pytest.raises(UserError, match=message):
        run_config([f"{group}=mine", "allow_targets=[mylab]"], conf)


@pytest.mark.parametrize(
    ("words", "place"),
    [
        (["dataset=mixture"], "dataset.parts.es"),
        ([], "evaluation.domains.es"),
        (["replay.share=0.1"], "replay.source"),
    ],
)
def test_a_dataset_of_theirs_without_a_class_is_named_in_any_place(conf, words, place):
    (Path(conf) / "dataset").mkdir(exist_ok=True)
    (Path(conf) / "dataset/mine.yaml").write_text("# Mine.\nnameOrPath: books\n")
    with pytest.raises(
        UserError, match=rf"dataset/mine.yaml: has no _target_, .* that dataset@{place}=mine stands for$"
    ):
        run_config([*words, f"dataset@{place}=mine"], conf)
    (Path(conf) / "dataset/mine.yaml").write_text("# Mine.\ndefaults: [local]\nnameOrPath: books\n")
    with pytest.raises(UserError, match=f"^{place}={{'nameOrPath': 'other'}}: not a dataset; choose its kind"):
        run_config([*words, f"+{place}.nameOrPath=other"], conf)  # not by that file


def test_help_lists_their_choices(conf, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    code, out, _ = command(["--help", "--config-dir", "conf"])
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert code == 0
    assert "optimizer lion Lion: the sign of the momentum." in lines
    assert "ourlab default Where our data is." in lines
    assert "transform adapter LoRA." in lines
    assert command(["optimizer=lion", "--help", "--config-dir=conf"])[1].startswith("optimizer=lion\n")


HOSTILE = "evil\x1b]0;x\x07"


def test_their_names_and_values_send_a_terminal_nothing(conf, command, tmp_path):
    folder = tmp_path / f"conf/{HOSTILE}"
    folder.mkdir()
    (folder / f"{HOSTILE}.yaml").write_text("# A comment.\n")
    (tmp_path / "conf/hook/raw.yaml").write_text('ema: {_target_: "a\\e[2Jb\\a"}\n')
    (tmp_path / "conf/hook/raw\udcff.yaml").write_text("x: 1\n")
    code, out, _ = command(["--help", "--config-dir", conf])
    assert code == 0
    assert r"evil\x1b]0;x\x07" in out
    out.encode()  # a name that is not UTF-8 can be printed
    code, _, err = command(["--config-dir", conf, "hook=[raw]"])
    assert code == 2
    assert r"hook.ema._target_='a\x1b[2Jb\x07'" in err
    for text in (out, err):
        assert not {"\x1b", "\x07"} & set(text)


@pytest.mark.parametrize("words", [["lr=1"], ["--help"], ["--cfg", "job"], ["-m", "seed=1,2"]])
def test_a_folder_with_an_impossible_name(command, words):
    code, _, err = command(["--config-dir", "d" * 300, *words])
    assert (code, err.splitlines()[-1]) == (2, f"error: --config-dir={'d' * 300}: no such folder")


def test_a_folder_that_cannot_be_read(conf, monkeypatch):
    """Root may read every folder, so the permission is refused in its place."""
    monkeypatch.setattr("os.access", lambda path, mode: str(path) != conf)
    with pytest.raises(UserError, match=f"--config-dir={conf}: can't be read"):
        run_config(["lr=1"], conf)


def test_the_config_that_is_shown_is_the_runs(command):
    import yaml

    words = ["optimizer._target_=torch.optim.Adafactor", "allow_targets=[torch.optim]"]
    code, out, err = command(["--cfg", "job", "--resolve", *words])
    assert code == 0, err
    assert yaml.safe_load(out)["optimizer"] == run_config(words).plain["optimizer"]


def test_sweeps_know_their_folder(conf, command, tmp_path):
    """A sweep names the mistake before its first job starts."""
    sweep = ["-m", "--config-dir", conf, f"sweep_dir={tmp_path / 'sweep'}", "allow_targets=[ourlab]"]
    code, _, err = command([*sweep, "optimizer=adamw,lin"])
    assert (code, "optimizer=lin: no such choice; did you mean 'lion'" in err) == (2, True), err
    code, _, err = command([*sweep, "seed=1,2", "optimizer._target_=ourlab.Lion", "optimizer.ep=1"])
    assert (code, "Lion has no 'ep'; did you mean 'eps'" in err) == (2, True), err
    code, _, err = command([*sweep, "+ourlab=default", "lr=0.1,0"])
    assert (code, "lr=0" in err) == (2, True), err
