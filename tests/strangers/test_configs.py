"""Command lines and config files as people write them: exit code 2 with one line, or the very config that was meant.

`test_any_word` and `test_any_file` draw words and edit our own YAML at random: whatever comes, it is a config that passes
the check or a mistake that is said, never another exception.
"""

import contextlib
import os
from pathlib import Path

import pytest
from hydra.errors import HydraException
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pretrain import yaml_file
from pretrain.compose import compose, forced, in_plain_words, resolve
from pretrain.config import GROUPS, check
from pretrain.errors import UserError
from pretrain.flags import parse
from pretrain.flat import overrides_from
from pretrain.quoting import NAME_KEYS, PATH_KEYS, quoted_word, unquoted
from tests.test_cli import assert_mistake
from tests.test_conf import FILES

SMALL = settings(deadline=None, derandomize=True, max_examples=25, suppress_health_check=list(HealthCheck))
LARGE = settings(SMALL, derandomize=False, max_examples=300)


def composed(arguments: list[str]) -> dict:
    """The checked config of a command line. Raises ``UserError`` for any mistake, as one line."""
    try:
        given = parse(arguments)
        words = [forced(quoted_word(word, sweeping=False)) for word in given.overrides]
        resolved = resolve(compose(words, given.config_dir))
        check(resolved, here=False)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(in_plain_words(error)) from None
    return resolved


def said(arguments: list[str]) -> str:
    """The message of a mistake, of one line; nothing where there is none."""
    try:
        composed(arguments)
    except UserError as error:
        message = str(error)
        assert message
        message.encode(errors="surrogateescape")
        return message
    return ""


# The command line ---------------------------------------------------------------------------------------------------

WORDS = {  # what was typed → (what the line says)
    "an option for a key": (["--lr=1e-3"], "--lr=1e-3: no such option; here it is lr=1e-3"),
    "… in two words": (["--lr", "1e-3"], "--lr: no such option; here it is lr=1e-3"),
    "… by another name": (["--learning-rate", "3e-4"], "--learning-rate: no such option; here it is lr=3e-4"),
    "… of a group": (["--dataset.nameOrPath=x"], "here it is dataset.nameOrPath=x"),
    "an option of nobody's": (["--fp16"], "--fp16: no such option; keys are key=value, without dashes"),
    "an option cut short": (["--conf=x"], "--conf=x: no such option"),
    "a file alone": (["run.yaml"], "run.yaml: not a setting; a flat YAML is --config run.yaml"),
    "a word alone": (["train"], "train: not a setting; words are key=value"),
    "two files": (["--config", "a.yaml", "--config=b.yaml"], "--config: one file, once"),
    "--resolve alone": (["--resolve"], "--resolve: only with --cfg job"),
    "--package alone": (["-p", "optimizer"], "--package: only with --cfg job"),
    "two commands": (["--cfg", "job", "--info"], "--cfg and --info: one of them at a time"),
    "--cfg of nothing": (["--cfg", "jib"], "invalid choice: 'jib'"),
    "--cfg without its word": (["--cfg"], "expected one argument"),
    "--cfg of an unknown key": (["--cfg", "job", "lerning_rate=1"], "unknown key 'lerning_rate'; here it is 'lr'"),
    "--cfg of a bad value": (["--cfg", "job", "lr=fast"], "lr='fast': input should be a valid number"),
    "--cfg of an unknown package": (
        ["--cfg", "job", "-p", "nope"],
        "--package=nope: the configuration has no such key",
    ),
    "no such folder of configs": (["--config-dir", "nowhere", "lr=1"], "--config-dir=nowhere: no such folder"),
    "a search path": (["hydra.searchpath=[file:///x]"], "another folder of configs is --config-dir"),
    "seed of 2^64": (["seed=18446744073709551616"], "seed=18446744073709551616: input should be less than"),
    "seed of 2^63": (["seed=9223372036854775808"], "seed=9223372036854775808: input should be less than"),
    "max_steps of 400 digits": (["max_steps=" + "9" * 400], "max_steps: an integer of more than 64 bits"),
    "max_steps of 5000 digits": (["max_steps=" + "9" * 5000], "4300"),
    "too many epochs": (["number_epochs=1e300"], "number_epochs=1e+300: input should be less than or equal to"),
    "not a number": (["optimizer.eps=nan"], "optimizer.eps: an integer of more than 64 bits, or NaN"),
    "a zero byte": (["dataset.name=a\0b"], "zero byte"),
    "a name that is no UTF-8": (["dataset.name=\udcff"], "not UTF-8"),
    "an unclosed bracket": (["generation.prompts=[a"], "no viable alternative"),
    "deep nesting": (["generation.prompts=" + "[" * 400 + "]" * 400], "nested too deeply"),
    "a list for a path": (["resume_allow=[everything]"], "resume_allow="),
}


@pytest.mark.parametrize("name", WORDS)
def test_words(name, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, says = WORDS[name]
    outcome = command(arguments)
    assert_mistake(outcome, says)
    assert outcome[1] == ""
    assert len(outcome[2].splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--version"], "pretrain 0."),
        (["--cfg", "job"], "output_dir: outputs/${name}"),
        (["--cfg", "job", "--resolve"], "output_dir: outputs/sample-python\n"),
        (["--cfg", "job", "--package", "optimizer"], "# @package optimizer"),
        (["--cfg", "hydra", "lr=-1"], "hydra:"),
        (["--cfg", "job", "precision=16-mixed"], "compute: float16"),
        (["--info", "searchpath"], "main"),
    ],
)
def test_what_is_shown(arguments, says, command):
    code, out, err = command(arguments)
    assert (code, err) == (0, "")
    assert says in out


def test_a_mistake_is_one_line_with_a_folder_of_configs_too(command, tmp_path):
    """Hydra had a second one: Error executing job with overrides."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text("# @package _global_\nlr: -1\n")
    code, _, err = command(["--config-dir", tmp_path, "experiment=mine"])
    assert (code, err) == (2, "error: lr=-1: input should be greater than 0 or input should be 'auto'\n")


# Paths and names ----------------------------------------------------------------------------------------------------

AS_TYPED = [
    "rel/книги",
    "data/lang=de",
    "a{b}c",
    "{a,b}",
    "a, b (1)",
    "it's",
    'say "x"',
    "[0-9]*.txt",
    "2024",
    "true",
    "1e5",
]
AS_TYPED += [
    "a:b",
    "#x",
    "a b ",
    "back\\slash",
    "a;b&c",
    "%41",
    "=",
    "a\nb",
    "x" * 300,
    "-",
    "ſ",
    "a'",
    "'a",
    "train[:10%]",
]
MEANT = {  # words that mean something to Hydra
    "'a,b'": "a,b",
    '"a b"': "a b",
    r"a\,b": "a,b",
    "str(1)": "1",
    "a-${seed}": "a-0",
    "'a, ${seed}'": "a, 0",
    "книги-${seed}": "книги-0",
}


def test_a_path_is_taken_as_it_is_typed():
    """All in one config, each as the path of a key of its own."""
    typed = [*AS_TYPED, *MEANT]
    words = [f"+x.k{i}.{key}={text}" for i, text in enumerate(typed) for key in ("output_dir", "nameOrPath", "name")]
    config = compose([forced(quoted_word(word, sweeping=False)) for word in words])
    found = OmegaConf.to_container(config, resolve=True)["x"]
    for i, text in enumerate(typed):
        assert set(found[f"k{i}"].values()) == {MEANT.get(text, text)}


@given(st.sampled_from(sorted(PATH_KEYS | NAME_KEYS)), st.text(min_size=1))
@example("output_dir", "\\'")
@example("nameOrPath", "a\\\\'b")
@example("name", "'\\")
@settings(SMALL, max_examples=200)
def test_any_path(key, typed):
    """In Hydra's grammar it is what was typed, but for what has a meaning there; and quoting twice is quoting once."""
    word = quoted_word(f"+x.{key}={typed}", sweeping=False)
    value = word.removeprefix(f"+x.{key}=")
    assert quoted_word(word, sweeping=False) == word
    if value != typed:
        assert unquoted(value) == typed
    elif unquoted(value) != typed:
        assert typed.lower() == "null" or typed[0] in "'\"" or "\\" in typed or "${" in typed or typed.endswith(")")


SWEPT = {
    "model_name=a,b": "model_name=a,b",
    "model_name=choice(a,b)": "model_name=choice(a,b)",
    "model_name=книги,b": "model_name='книги',b",
    "dataset.nameOrPath=lang=de/a,lang=de/b": "dataset.nameOrPath='lang=de/a','lang=de/b'",
    "output_dir={a}": "output_dir='{a}'",
    "lr=1,2": "lr=1,2",
}


@pytest.mark.parametrize("word", SWEPT)
def test_a_sweep_over_paths(word):
    assert quoted_word(word, sweeping=True) == SWEPT[word]


def test_the_home_folder(monkeypatch):
    """``~`` is the home folder wherever a path is the value of a key, and nothing but a letter in a name."""
    monkeypatch.setenv("HOME", "/home/me")
    keys = ["output_dir", "sweep_dir", "model_name", "resume", "dataset.nameOrPath", "model.tokenizer_name"]
    words = ["dataset=local", "dataset.name=~/x", *(f"{key}=~/x" for key in keys)]
    found = resolve(compose([forced(quoted_word(word, sweeping=False)) for word in words]))
    for key in [*keys, "model.name_or_path"]:
        assert OmegaConf.select(OmegaConf.create(found), key) == "/home/me/x"
    assert found["dataset"]["name"] == "~/x"


def test_the_home_folder_in_a_flat_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "flat.yaml").write_text("output_dir: ~/x\ndataset: {nameOrPath: ~/y}\n")
    found = resolve(compose([forced(word) for word in overrides_from(tmp_path / "flat.yaml", [])]))
    assert (found["output_dir"], found["dataset"]["nameOrPath"]) == ("/home/me/x", "/home/me/y")


def test_the_current_folder_is_not_moved_aside(command, base_arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("config.yaml", ".run_id", "metrics.jsonl"):
        Path(name).write_text("lr: 1\n")
    outcome = command([*base_arguments, "output_dir=.", "resume=never"])
    assert_mistake(outcome, "can't be moved aside, you are in it")
    assert Path("config.yaml").read_text() == "lr: 1\n"


# Files --------------------------------------------------------------------------------------------------------------

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
YAML = {  # content → what the line says
    "aliases of aliases": (BOMB, "more than 100000 values"),
    "an alias inside itself": ("lr: &a [*a]\n", "*a stands for nothing that is complete"),
    "an alias of nothing": ("lr: *a\n", "*a stands for nothing"),
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


# Generated ----------------------------------------------------------------------------------------------------------

KEYS = ["lr", "seed", "max_steps", "name", "output_dir", "batch_size", "resume_allow", "allow_targets", "sink", "model"]
KEYS += [
    "optimizer._target_",
    "scheduler._partial_",
    "evaluation.domains",
    "evaluation.domains.base",
    "model.overrides",
]
KEYS += [
    "dataset",
    "dataset.nameOrPath",
    "sink.console.level",
    "generation.prompts",
    "hydra.mode",
    "a.b",
    "experiment",
    "",
]
VALUES = [
    "1",
    "-1",
    "1e-3",
    "1e400",
    "nan",
    "null",
    "true",
    "''",
    "[]",
    "{}",
    "[1,a]",
    "{a:1}",
    "{_target_:x}",
    "???",
    "${lr}",
]
VALUES += [
    "${nope}",
    "${oc.env:HOME}",
    "${oc.create:{a:1}}",
    "a,b",
    "choice(a)",
    "~/x",
    "~",
    "[",
    "}",
    "'",
    "\\",
    "=",
    "9" * 25,
]
VALUES += [
    "pretrain.strategy.single.Single",
    "local",
    "sample",
    "[console]",
    "single",
    "{_target_:pretrain.cli.main}",
    " ",
    "",
]
values = st.one_of(st.sampled_from(VALUES), st.text(max_size=8))
words = st.builds(
    "{}{}{}{}".format, st.sampled_from(["", "", "", "+", "++", "~"]), st.sampled_from(KEYS), st.just("="), values
)


def any_word(drawn):
    said(["task=tokenization", *drawn])


test_any_word = SMALL(given(st.lists(st.one_of(words, words, st.text(max_size=6)), min_size=1, max_size=3))(any_word))
test_very_many_words = pytest.mark.slow(
    LARGE(given(st.lists(st.one_of(words, st.text(max_size=6)), min_size=1, max_size=4))(any_word))
)

JUNK = [
    "null",
    "[]",
    "{}",
    "-1",
    "1e400",
    ".nan",
    "9" * 30,
    '"\\ud800"',
    "${nope}",
    "${lr}",
    "&a [*a]",
    "*a",
    "!!binary aGk=",
]
JUNK += [
    "!!python/name:os.system",
    "2020-01-01",
    "0x10",
    "'",
    "{",
    "\t",
    "~",
    "yes",
    "[[1], {a: b}]",
    "{_target_: x}",
    "<<: 1",
]
JUNK += ["pretrain.optim.adamw.AdamW", "???", "a: b: c", "{_partial_: true}", "!!set {a}", "? x"]
junk = st.one_of(st.sampled_from(JUNK), st.text(max_size=6))


@st.composite
def edited(draw):
    """One of our own files with a few lines changed: (group, text)."""
    file = draw(st.sampled_from(FILES))
    lines = file.read_text().splitlines()
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(lines) - 1))
        indent, key = lines[place][: len(lines[place]) - len(lines[place].lstrip())], lines[place].partition(":")[0]
        change = draw(st.sampled_from(["value", "value", "key", "delete", "double", "indent", "text"]))
        new = draw(junk)
        lines[place : place + 1] = {
            "value": [f"{key}: {new}"],
            "key": [f"{indent}{new}:{lines[place].partition(':')[2]}"],
            "delete": [],
            "double": [lines[place]] * 2,
            "indent": [f"  {lines[place]}"],
            "text": [lines[place], new],
        }[change] or [""]
    return file.parent.name, "\n".join(lines)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("theirs")
    for group in (*GROUPS, "experiment"):
        (folder / group).mkdir()
    return folder


def any_file(theirs, drawn):
    group, text = drawn
    (theirs / group / "mine.yaml").write_text(text, encoding="utf-8", errors="surrogateescape")
    chosen = f"{group}=[mine]" if group == "sink" else f"{group}=mine"
    said(["--config-dir", str(theirs), chosen])
    with contextlib.suppress(UserError):
        overrides_from(theirs / group / "mine.yaml", [])


test_any_file = SMALL(given(drawn=edited())(any_file))
test_very_many_files = pytest.mark.slow(LARGE(given(drawn=edited())(any_file)))
