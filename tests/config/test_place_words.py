"""`group@place=choice` fills a place of the config, whether a defaults list has it or not, with or without a `+`."""

import pytest
from hydra.types import RunMode

from pretrain.cli.flat_yaml import overrides_from
from pretrain.config.check import conf_dir
from pretrain.config.compose import ShowingHydra, compose, forced, run_config
from pretrain.config.hydra_configs import compose_config, composing
from pretrain.config.hydra_trust import check_hydra
from pretrain.runtime.errors import UserError
from pretrain.sweep.plan import Plan

MIXED = ["dataset=mixture", "dataset@dataset.parts.es=local", "dataset.parts.es.nameOrPath=es/"]
LOCAL, SAMPLE, MIXTURE = "local.Local", "sample.Python", "mixture.Mixture"


def targets(node, path=()):
    """Path → class of every dataset in a plain config."""
    found = {}
    for key, value in node.items() if isinstance(node, dict) else ():
        if str(value.get("_target_", "") if isinstance(value, dict) else "").startswith("pretrain.data.sources."):
            found[".".join((*path, key))] = value["_target_"].removeprefix("pretrain.data.sources.")
        found |= targets(value, (*path, key))
    return found


BASE = {"dataset": MIXTURE, "dataset.parts.es": LOCAL, "evaluation.domains.base": "sample.English"}
PLACES = {
    "the last word counts": (
        ["dataset@dataset.parts.b=local", "+dataset@dataset.parts.b=huggingface", "dataset@dataset.parts.b=sample"],
        {**BASE, "dataset.parts.b": SAMPLE},
    ),
    "an existing place": (
        ["dataset@evaluation.domains.base=sample"],
        {**BASE, "evaluation.domains.base": SAMPLE},
    ),
    "an existing place with a plus": (
        ["+dataset@evaluation.domains.base=sample"],
        {**BASE, "evaluation.domains.base": SAMPLE},
    ),
    "other places": (
        ["dataset@replay.source=sample", "dataset@evaluation.domains.x=sample"],
        {**BASE, "replay.source": SAMPLE, "evaluation.domains.x": SAMPLE},
    ),
    "a mixture in a mixture": (
        ["dataset@dataset.parts.a=mixture", "dataset@dataset.parts.a.parts.b=sample"],
        {**BASE, "dataset.parts.a": MIXTURE, "dataset.parts.a.parts.b": SAMPLE},
    ),
    "the inner one first": (
        ["dataset@dataset.parts.a.parts.b=sample", "dataset@dataset.parts.a=mixture"],
        {**BASE, "dataset.parts.a": MIXTURE, "dataset.parts.a.parts.b": SAMPLE},
    ),
    "the place of the group itself": (["dataset@dataset=mixture"], BASE),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_place_is_filled(name):
    words, expected = PLACES[name]
    assert targets(run_config([*MIXED, *words]).plain) == expected


def test_a_place_of_an_experiment_is_replaced_and_the_new_one_next_to_it_added(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/two.yaml").write_text(
        "# @package _global_\n"
        "defaults:\n  - /dataset@dataset.parts.a: sample\n  - override /dataset: mixture\n"
        "dataset:\n  parts:\n    a: {held_out: 0.25}\n"
    )
    words = ["experiment=two", "dataset@dataset.parts.b=sample"]
    config = run_config(words, str(tmp_path))
    assert {n: p.held_out for n, p in config.dataset.parts.items()} == {"a": 0.25, "b": 0.05}
    words += ["dataset@dataset.parts.a=local", "dataset.parts.a.nameOrPath=x"]
    assert targets(run_config(words, str(tmp_path)).plain)["dataset.parts.a"] == LOCAL


def test_what_is_shown_is_what_runs(capsys):
    with composing(conf_dir(), None, ShowingHydra) as hydra:
        hydra.show_cfg("config", MIXED, "job", "dataset.parts", False)
    assert "nameOrPath: es/" in capsys.readouterr().out


def test_a_sweep_over_the_choice_of_a_place():
    """A place that no defaults list has, with and without a plus; Hydra gives each job the words of its own."""
    words = ["dataset=mixture", "dataset@dataset.parts.b=sample,sample_base", "+dataset@dataset.parts.c=sample"]
    check_hydra(words, conf_dir(), None)
    with composing(conf_dir(), None) as hydra:
        plan = Plan(hydra.config_loader, compose_config(hydra, [*words, "hydra.mode=MULTIRUN"], RunMode.MULTIRUN))
        plan.check({})
        assert [sorted(job) for job in plan.jobs] == [
            ["+dataset@dataset.parts.c=sample", "dataset=mixture", f"dataset@dataset.parts.b={choice}"]
            for choice in ("sample", "sample_base")
        ]


MISTAKES = {
    "datset@dataset.parts.es=local": "datset@…: no such group; did you mean 'dataset'?",
    "dataset@dataset.parts.es=locl": "dataset=locl: no such choice; did you mean 'local'?",
    "dataset@dataset.part.b=sample": "dataset: Mixture has no 'part'; did you mean 'parts'",
    "dataset@dataset.part.b=local": "(there is dataset.parts; a misspelling?)",
    "dataset@datset.parts.b=sample": "unknown key 'datset'; did you mean 'dataset'",
    "dataset@evaluation.domain.b=local": "(there is evaluation.domains; a misspelling?)",
    "dataset@dataset.parts=sample": "dataset.parts: each of its items needs a name: dataset.parts.NAME",
    "dataset@evaluation.domains.b=mixture": "evaluation.domains.b: a mixture can't be here",
    "dataset@replay.source=mixture": "replay.source: a mixture can't be here",
    "model@dataset.parts.b=scratch": "dataset.parts.b._target_='pretrain.models.causal_lm.Scratch': not a part",
    "dataset.parts.ess.held_out=0.1": "dataset.parts.ess={'held_out': 0.1}: not a dataset; did you mean 'es'? If not, choose",
    "evaluation.domains.bsae.held_out=0.1": "bsae={'held_out': 0.1}: not a dataset; did you mean 'base'? If not, choose",
    "dataset.parts.french.held_out=0.1": "dataset.parts.french={'held_out': 0.1}: not a dataset; choose its kind: dataset@",
    "dataset.parts.es.subset=x": "Local has no 'subset'; it is a key of dataset@dataset.parts.es=huggingface",
    "phases={from: 0.5}": "phases={from: 0.5}: a value of another kind",
}


@pytest.mark.parametrize("word", MISTAKES)
def test_a_mistake_is_named(word):
    with pytest.raises(UserError) as refused:
        run_config([*MIXED, word])
    assert MISTAKES[word] in str(refused.value)


def test_a_part_whose_path_is_given_under_another_name():
    with pytest.raises(UserError, match=r"\(there is dataset.parts.coed; a misspelling\?\)"):
        run_config(["dataset=mixture", "dataset@dataset.parts.code=local", "dataset.parts.coed.nameOrPath=x"])
    with pytest.raises(UserError) as refused:  # the names of two parts may be alike
        run_config(["dataset=mixture", "dataset@dataset.parts.code=local", "dataset@dataset.parts.code2=sample"])
    assert "misspelling" not in str(refused.value)


FLAT = """\
dataset:
  source: mixture
  parts:
    es: {source: local, nameOrPath: es/}
    inner: {source: mixture, parts: {a: {source: sample}, b: {nameOrPath: b/}}}
  weights: {es: 3, inner: 1}
replay: {share: 0.125, source: {nameOrPath: old/}}
phases:
  - {from: 0.75, weights: {es: 1}, replay_share: 0.25}
"""
FLAT_PLACES = {
    "dataset": MIXTURE,
    "dataset.parts.es": LOCAL,
    "dataset.parts.inner": MIXTURE,
    "dataset.parts.inner.parts.a": SAMPLE,
    "dataset.parts.inner.parts.b": LOCAL,
    "replay.source": LOCAL,
    "evaluation.domains.base": "sample.English",
}


def flat(tmp_path, text, *later):
    (tmp_path / "flat.yaml").write_text(text)
    return run_config(overrides_from(tmp_path / "flat.yaml", list(later)))


def test_a_flat_file_has_mixtures_replay_and_phases(tmp_path):
    config = flat(tmp_path, FLAT)
    assert targets(config.plain) == FLAT_PLACES
    assert config.dataset.weights == {"es": 3, "inner": 1}
    assert (config.replay.share, config.replay.source.nameOrPath) == (0.125, "old/")
    [phase] = config.training_phases
    assert (phase.start, phase.weights, phase.replay_share) == (0.75, {"es": 1}, 0.25)


def test_a_later_choice_of_a_place_replaces_the_file_s_whole(tmp_path):
    found = targets(flat(tmp_path, FLAT, "+dataset@dataset.parts.es=sample").plain)
    assert found == {**FLAT_PLACES, "dataset.parts.es": SAMPLE}
    without = {key: target for key, target in FLAT_PLACES.items() if not key.startswith("dataset.")}
    assert targets(flat(tmp_path, FLAT, "dataset=sample", "phases=[]").plain) == {**without, "dataset": SAMPLE}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("dataset: {source: mixture, parts: {es: 5}}", "dataset.parts.es=5: must be a mapping"),
        ("dataset: {source: mixtur}", "dataset.source='mixtur': not a source; did you mean 'mixture'"),
        ("dataset: {source: mixture, parts: {a: {source: hff}}}", "dataset.parts.a.source='hff': not a source"),
        ("replay: {shar: 0.1}", "replay: ReplayConfig has no 'shar'; did you mean 'share'"),
        ("replay: 0.1", "replay=0.1: input should be a valid dictionary"),
    ],
)
def test_mistakes_in_a_flat_file(text, says, tmp_path):
    with pytest.raises(UserError) as refused:
        flat(tmp_path, text)
    assert says in str(refused.value)


def test_a_default_name_is_that_of_the_parts():
    names = {n: [f"dataset@dataset.parts.{c}=sample" for c in "abcd"[:n]] for n in (2, 4)}
    found = {n: run_config(["dataset=mixture", *words]).name for n, words in names.items()}
    assert found == {2: "sample-a_b", 4: "sample-a_b_2"}
    assert compose([forced("dataset=mixture")]).get("name") is None
