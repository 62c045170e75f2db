"""Every YAML under conf/ composes and passes the check; a part is added by its YAML alone."""

import copy
import inspect
import re
import sys
from collections import Counter
from dataclasses import fields
from importlib import import_module
from io import StringIO
from token import NAME
from tokenize import generate_tokens

import hydra
import pytest
from omegaconf import OmegaConf

from pretrain.config.check import GROUPS, check, conf_dir
from pretrain.config.compose import resolve
from pretrain.config.schema import RootKeys
from pretrain.config.trust import MULTI_SELECT
from pretrain.runtime.errors import UserError

NEEDS = {  # keys without a default
    ("dataset", "local"): ["dataset.nameOrPath=texts"],
    ("dataset", "huggingface"): ["dataset.nameOrPath=texts"],
    ("dataset", "mixture"): ["+dataset@dataset.parts.a=sample"],
    ("precision", "16-mixed"): ["precision.allow_cpu=true"],
    ("transform", "freeze"): ["transform.freeze.frozen=embed"],
    ("transform", "vocabulary"): ["transform.vocabulary.size=8"],
}
FILES = sorted(f for g in (*GROUPS, "experiment") for f in (conf_dir() / g).glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=[f"{f.parent.name}={f.stem}" for f in FILES])
def test_composes_and_checks(file, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    group, choice = file.parent.name, file.stem
    override = f"{group}=[{choice}]" if group in MULTI_SELECT else f"{group}={choice}"
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = hydra.compose("config", overrides=[override, *NEEDS.get((group, choice), [])])
    check(resolve(config))


def test_the_sweep_over_means_has_each_of_them():
    folder = conf_dir() / "experiment/means"
    files = {file.stem: file for file in folder.glob("*.yaml")}
    swept = OmegaConf.load(folder.with_suffix(".yaml")).hydra.sweeper.params["experiment/means"].split(",")
    assert sorted(swept) == sorted(files)
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        for name, file in files.items():
            assert file.read_text().startswith("# @package _global_\n# ")
            config = hydra.compose("config", overrides=["experiment=means", f"experiment/means={name}"])
            check(resolve(config))
            own = OmegaConf.load(file)
            own.pop("defaults", None)
            assert OmegaConf.to_container(OmegaConf.merge(config, own)) == OmegaConf.to_container(config), name


@pytest.mark.parametrize("file", FILES, ids=[f"{f.parent.name}={f.stem}" for f in FILES])
def test_says_what_it_is_for(file):
    assert file.read_text().startswith("# "), "the first comment line is its entry in --help"


@pytest.mark.parametrize("file", [f for f in FILES if f.parent.name not in ("experiment", "evaluation", *MULTI_SELECT)])
def test_lists_every_key_of_its_target(file):
    """A reader of the YAML sees all there is to set."""
    from pretrain.config.check import in_yaml
    from pretrain.config.schema import RUNTIME_ARGUMENTS
    from pretrain.config.trust import PARTS, locate

    node = OmegaConf.to_container(OmegaConf.load(file))
    parameters = inspect.signature(locate(file.parent.name, node["_target_"], PARTS[file.parent.name])).parameters
    keys = {in_yaml(name) for name in parameters} - RUNTIME_ARGUMENTS.get(file.parent.name, set())
    assert keys - set(node) <= OPTIONAL.get(file.stem, set())


OPTIONAL = {name: {"allow_cpu", "tf32"} for name in ("32-true", "bf16-mixed", "bf16-true", "16-mixed")}


TEXTS = {"name", "output_dir", "model_name", "sweep_dir", "resume"}  # keys that may be any word


@pytest.fixture(scope="module")
def composed():
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return hydra.compose("config", overrides=["dataset=local", *NEEDS["dataset", "local"]])


@pytest.mark.parametrize("key", sorted({*OmegaConf.load(conf_dir() / "config.yaml"), *GROUPS} - {"defaults", "hydra"}))
def test_a_key_that_holds_a_word_is_a_mistake(key, composed):
    """As in an experiment that was cut off behind the first letter of what belongs to the key."""
    config = copy.deepcopy(composed)
    OmegaConf.set_struct(config, False)
    config[key] = "n"
    if key in TEXTS:
        check(resolve(config))
    else:
        with pytest.raises(UserError, match=key):
            check(resolve(config))


SOURCES = "\n".join(file.read_text() for file in (conf_dir().parent / "pretrain").rglob("*.py"))


@pytest.mark.parametrize(
    "file", [f for f in FILES if f.parent.name != "experiment"], ids=lambda f: f"{f.parent.name}={f.stem}"
)
def test_every_key_is_read(file):
    """As an attribute of the part, or by name in the module that has it as a parameter."""
    node = OmegaConf.to_container(OmegaConf.load(file))
    for part in [node] if "_target_" in node else [v for v in node.values() if isinstance(v, dict) and "_target_" in v]:
        module = inspect.getsource(import_module(part["_target_"].rpartition(".")[0]))
        names = Counter(t.string for t in generate_tokens(StringIO(module).readline) if t.type == NAME)
        for key in (key for key in part if not key.startswith("_")):
            assert re.search(rf"\.{key}_?\b", SOURCES) or names[key] > 1, key


def test_every_root_key_is_read():
    unread = {f.name for f in fields(RootKeys) if not re.search(rf"\b(config|self|checked)\.{f.name}\b", SOURCES)}
    of_groups = {"weight_decay", "beta1", "beta2"}  # which take them by interpolation
    assert unread <= of_groups | {"allow_targets", "sweep_dir"}, "read by pretrain.config, and by the sweep"


# -- documentation --------------------------------------------------------------------------------------------------------

sys.path.insert(0, str(conf_dir().parent / "scripts"))
import make_comments  # noqa: E402


@pytest.mark.parametrize("file", make_comments.files(), ids=lambda f: f"{f.parent.name}={f.stem}")
def test_comments_are_those_of_the_docstrings(file):
    """Each key is documented once, by the class or the function that has it."""
    assert file.read_text() == make_comments.commented(file), "run: python scripts/make_comments.py"


def test_every_key_is_documented():
    parts = [(file, keys, docs) for file in make_comments.files() for _, keys, docs in make_comments.parts_of(file)]
    assert [(file.name, set(keys) - docs.keys()) for file, keys, docs in parts if set(keys) - docs.keys()] == []


def test_a_key_is_documented_by_its_class_or_a_base_class():
    class Part:
        """A part.

        Attributes:
            one: The first, which is
                long.
            two_: The second.
        """

    class Other(Part):
        """Another.

        Attributes:
            three: The third: of three.
        """

    docs = {"one": "The first, which is long.", "two": "The second."}
    assert make_comments.field_docs(Part) == docs
    assert make_comments.field_docs(Other) == docs | {"three": "The third: of three."}
