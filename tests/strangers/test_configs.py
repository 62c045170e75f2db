"""Command lines as people write them: exit code 2 with one line, or the very config that was meant."""

from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from pretrain.cli.flat_yaml import overrides_from
from pretrain.config.compose import compose, forced, resolve
from pretrain.config.quoting import LIST, NAME_KEYS, PATH_KEYS, quoted_word, unquoted
from tests.cli.test_cli import assert_mistake

SMALL = settings(deadline=None, derandomize=True, max_examples=25, suppress_health_check=list(HealthCheck))
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
    "two files": (["--config", "a.yaml", "--config=b.yaml"], "--config: only one file is allowed"),
    "--resolve alone": (["--resolve"], "--resolve: only with --cfg job"),
    "--package alone": (["-p", "optimizer"], "--package: only with --cfg job"),
    "two commands": (["--cfg", "job", "--info"], "--cfg and --info: only one of them is allowed"),
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
    "a long model": (["model_name=" + "a" * 300], "longer than a file's name"),
    "a long file": (["dataset=local", "dataset.nameOrPath=x/" + "é" * 200 + "/*.txt"], "longer than a file's name"),
    "a long folder": (["output_dir=runs/" + "a" * 5000], "longer than a file's name"),
    "a long tokenizer": (["model.tokenizer_name=" + "a" * 300], "longer than a file's name"),
    "a zero byte": (["dataset.name=a\0b"], "zero byte"),
    "a condition that is code": (
        ["dataset.where=__import__('os').system('ls') == 0"],
        """dataset.where="__import__('os').system('ls') == 0": no function""",
    ),
    "a condition in SQL": (["dataset.where=lang = 'es' AND score > 1"], "one looks like lang == 'es' and score > 0.8"),
    "a template that is code": (
        ["dataset.text_template={text.__class__}"],
        "{text.__class__} is not the plain name of a column",
    ),
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
        (
            ["--cfg", "job", "dataset.where=lang in ('es', 'pt') and score > 0.8"],
            "where: lang in ('es', 'pt') and score > 0.8",
        ),
        (
            ["--cfg", "job", r"dataset.text_template={title}\n\n{body}, {end}"],
            r"text_template: '{title}\n\n{body}, {end}'",
        ),
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
    if key == "nameOrPath" and LIST.fullmatch(typed) and value[0] == "[":
        assert isinstance(OverridesParser.create().parse_override(f"key={value}").value(), list)
    elif value != typed:
        assert unquoted(value) == typed
    elif unquoted(value) != typed:
        assert typed.lower() == "null" or typed[0] in "'\"" or "\\" in typed or "${" in typed or typed.endswith(")")


LISTS = {
    "[a,b]": ["a", "b"],
    "[books/]": ["books/"],
    "[lang=de/a.txt, b (1).txt,'c,d',]": ["lang=de/a.txt", "b (1).txt", "c,d"],
    "['c,d', e]": ["c,d", "e"],
    "[s3://b/x/*.jsonl, 2024,true]": ["s3://b/x/*.jsonl", "2024", "true"],
    "[0-9]": "[0-9]",  # a glob
    "[0-9]*.txt": "[0-9]*.txt",
}


@pytest.mark.parametrize("typed", LISTS)
def test_a_list_of_paths(typed):
    (word,) = [quoted_word(f"dataset.nameOrPath={typed}", sweeping=False)]
    found = OmegaConf.to_container(compose(["dataset=local", forced(word)]), resolve=True)["dataset"]["nameOrPath"]
    assert found == LISTS[typed]


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
