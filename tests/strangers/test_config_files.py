"""Config files as people write them: exit code 2 with one line, or the very config that was meant."""

import os

import pytest

from pretrain.config import yaml_file
from tests.cli.test_cli import assert_mistake
from tests.config.test_conf import FILES

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
YAML = {  # content → what the line says
    "aliases of aliases": (BOMB, "more than 100000 values"),
    "an alias inside itself": ("lr: &a [*a]\n", "*a refers to nothing that is complete"),
    "an alias of nothing": ("lr: *a\n", "*a refers to nothing"),
    "deep lists": ("lr: " + "[" * 200_000 + "]" * 200_000 + "\n", "nested more than 50 deep"),
    "deep mappings": ("lr: " + "{a: " * 5_000 + "\n", "nested more than 50 deep"),
    "a huge file": ("lr: 1 # " + "x" * 2**20 + "\n", "larger than 1 MiB"),
    "a zero byte": ("lr: \0\n", "can't be read as YAML"),
    "not UTF-8": (b"name: caf\xe9\n", "can't be read as YAML"),
    "no YAML": ("lr: [1\n", "can't be read as YAML"),
    "a tab": ("a:\n\tb: 1\n", "can't be read as YAML"),
    "an object": ("seed: !!python/object/apply:os.system [x]\n", "can't be read as YAML"),
    "bytes": ("name: !!binary aGVsbG8=\n", "name="),
    "two documents": ("lr: 1\n---\nlr: 2\n", "can't be read as YAML"),
    "a key twice": ("lr: 1\nlr: 2\n", "can't be read as YAML"),
    "a key that is a list": ("[a]: 1\n", "can't be read as YAML"),
    "a list": ("- a\n", "mapping"),
    "a word": ("hello\n", "hello"),
    "a lone surrogate": ('name: "\\ud83d"\n', "can't be read as YAML"),
    "an integer of 400 digits": ("max_steps: " + "9" * 400 + "\n", "integer of more than 64 bits"),
    "an interpolation of nothing": ("lr: ${nope}\n", "nope"),
}


@pytest.mark.parametrize("kind", ["--config", "--config-dir"])
@pytest.mark.parametrize("name", YAML)
def test_files(name, kind, command, tmp_path):
    content, says = YAML[name]
    file = tmp_path / "experiment" / "mine.yaml"
    file.parent.mkdir()
    content = content.encode() if isinstance(content, str) else content
    file.write_bytes(content if kind == "--config" else b"# @package _global_\n" + content)
    chosen = ["--config", file] if kind == "--config" else ["--config-dir", tmp_path, "experiment=mine"]
    code, _, err = command([*chosen, "task=tokenization", f"output_dir={tmp_path / 'run'}"])
    assert code == 2, err
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert says in err or kind == "--config-dir"
    assert not (tmp_path / "run").exists()


FLAT = {
    "learning_rate: 1e-3": "unknown key 'learning_rate'; here it is 'lr'",
    "epochs: 3": "unknown key 'epochs'; here it is 'number_epochs'",
    "sharding_strateg: x": "unknown key 'sharding_strateg'; did you mean 'sharding_strategy'",
    "seed: 18446744073709551616": "seed=18446744073709551616",
    "dataset: {source: local, 'a b': 1}": "a b",
    "dataset: {source: local, nameOrPath: [1]}": "nameOrPath",
    "dataset: {source: {a: local}, nameOrPath: x}": "dataset.source={'a': 'local'}: not a source",
    "5": "can't be read as YAML",
    "-2.225e-311": "can't be read as YAML",
    "true": "can't be read as YAML",
    "!!binary aGk=": "can't be read as YAML",
    "!!set {a}": "can't be read as YAML",
    "[1, 2]": "not a YAML mapping",
    "null": "not a YAML mapping",
}


@pytest.mark.parametrize("text", FLAT)
def test_flat_files(text, command, tmp_path):
    (tmp_path / "flat.yaml").write_text(text + "\n")
    assert_mistake(command(["--config", tmp_path / "flat.yaml"]), FLAT[text])


@pytest.mark.parametrize("name", ["folder", "missing", "fifo"])
def test_what_is_no_file(name, command, tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    assert_mistake(command(["--config", tmp_path / name]), "no such file" if name == "missing" else "not a file")


def test_a_config_of_today_is_within_the_limits(tmp_path):
    """With aliases, as deep and large as a real one."""
    anchored = "a: &a {x: [1, 2, {y: z}]}\nb: *a\nc: [*a, *a]\n"
    (tmp_path / "x.yaml").write_text(anchored)
    assert yaml_file.read_yaml(tmp_path / "x.yaml")["c"] == [{"x": [1, 2, {"y": "z"}]}] * 2
    for file in FILES:
        yaml_file.checked_text(file)
