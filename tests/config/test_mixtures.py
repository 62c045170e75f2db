"""Mistakes in the weights, phases and replay of a run are found before it starts, each with its key."""

import copy
from operator import mul

import pytest

from pretrain.config.check import check
from pretrain.config.compose import compose, resolve
from pretrain.data.sources.mixture import by_source
from pretrain.runtime.errors import UserError


@pytest.fixture(scope="module")
def composed():
    words = ["dataset=mixture", "dataset@dataset.parts.es=sample", "dataset@dataset.parts.code=sample"]
    words += ["dataset@dataset.parts.more=mixture", "dataset@dataset.parts.more.parts.x=sample"]
    return resolve(compose(words))


@pytest.fixture
def checked(composed, monkeypatch):
    """``checked({dotted key: value}) -> RunConfig`` of a mixture with the parts es, code and more."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def run(values):
        config = copy.deepcopy(composed)
        for path, value in values.items():
            *groups, key = path.split(".")
            node = config
            for group in groups:
                node = node[group]
            if value is None:
                del node[key]
            else:
                node[key] = value
        return check(config)

    return run


SAMPLE = {"_target_": "pretrain.data.sources.sample.Python"}
WEIGHTS = {"es": 1, "code": 1, "more": 2}
MISTAKES = {
    "a part that is not there": (
        {"dataset.weights": WEIGHTS | {"spanish": 1}},
        "dataset.weights.spanish: the mixture has no such part; allowed: ",
    ),
    "a misspelt part": ({"dataset.weights": {"ess": 1}}, "dataset.weights.ess: the mixture has no such part; did you mean 'es'"),
    "a part without a weight": ({"dataset.weights": {"es": 1, "more": 1}}, "dataset.weights: no weight for 'code'; give every"),
    "negative": ({"dataset.weights": WEIGHTS | {"es": -1}}, "dataset.weights={'es': -1, 'code': 1, 'more': 2}: input"),
    "all zero": ({"dataset.weights": dict.fromkeys(WEIGHTS, 0.0)}, "dataset.weights: all are 0; at least one part needs"),
    "NaN": ({"dataset.weights.es": float("nan")}, "dataset.weights.es: an integer of more than 64 bits, or NaN"),
    "infinite": ({"dataset.weights": WEIGHTS | {"es": float("inf")}}, ": input should be a finite number"),
    "a text": ({"dataset.weights": WEIGHTS | {"es": "1"}}, ": input should be a valid number"),
    "a list": ({"dataset.weights": [1, 1]}, "dataset.weights=[1, 1]: input should be a valid dictionary"),
    "weights of an inner part": (
        {"dataset.parts.more.weights": {"y": 1}},
        "dataset.parts.more.weights.y: the mixture has no such part; allowed: x",
    ),
    "an inner mixture without parts": (
        {"dataset.parts.more.parts": {}},
        "dataset.parts.more.parts: a mixture needs a part: dataset@dataset.parts.more.parts.NAME=local",
    ),
    "max_epochs of no part": ({"dataset.max_epochs": {"cod": 2}}, "dataset.max_epochs.cod: the mixture has no such part"),
    "max_epochs 0": ({"dataset.max_epochs": {"code": 0}}, "dataset.max_epochs={'code': 0}: input should be greater than 0"),
    "loss weights of no part": ({"dataset.loss_weights": {"cod": 2}}, "dataset.loss_weights.cod: the mixture has no such part"),
    "a negative loss weight": ({"dataset.loss_weights": {"code": -1}}, "dataset.loss_weights={'code': -1}: input should be"),
    "loss weights all zero": ({"dataset.loss_weights": dict.fromkeys(WEIGHTS, 0)}, "dataset.loss_weights: all are 0"),
    "no temperature": ({"dataset.temperature": 0}, "dataset.temperature=0: input should be greater than 0"),
    "a part of its own mask": (
        {"dataset.parts.es.document_mask": True},
        "dataset.parts.es.document_mask=true: applies to all parts of a mixture: dataset.document_mask=true",
    ),
    "a part that is held out": ({"dataset.parts.es.held_out": 1}, "dataset.parts.es.held_out=1: input should be less than 1"),
    "a part called replay": ({"dataset.parts.replay": SAMPLE}, "dataset.parts: 'replay' is the name of the replayed text"),
    "a name that is a path": ({"dataset.parts.a/b": SAMPLE}, "dataset.parts: 'a/b' is not a name"),
    "a name that ends a line": ({"dataset.parts.a\nb": SAMPLE}, r"dataset.parts: 'a\nb' is not a name"),
    "an empty name": ({"dataset.parts": {"": SAMPLE}}, "dataset.parts: '' is not a name"),
    "a name that is a number": ({"dataset.parts": {1: SAMPLE}}, "input should be a valid string"),
    "no share": ({"replay.share": 1}, "replay.share=1: input should be less than 1"),
    "a negative share": ({"replay.share": -0.1}, "replay.share=-0.1: input should be greater than or equal to 0"),
    "replay without base domains": ({"replay.share": 0.1, "evaluation.domains": {}}, "replay.share=0.1: there is no old text"),
    "replay of what is new": ({"replay.share": 0.1, "evaluation.domains.base.role": "new"}, "there is no old text"),
    "replay of what is held out": (
        {"replay.share": 0.1, "evaluation.domains.base.held_out": 1},
        "replay.share=0.1: evaluation.domains.base holds out all its documents (held_out=1)",
    ),
    "a source that is held out": (
        {"replay.share": 0.1, "replay.source": SAMPLE | {"held_out": 1.0}},
        "replay.source.held_out=1: input should be less than 1",
    ),
    "replay in a phase only": (
        {"phases": [{"from": 0.5, "replay_share": 0.1}], "evaluation.domains": {}},
        "phases[0].replay_share=0.1: there is no old text",
    ),
    "phases that do not ascend": (
        {"phases": [{"from": 0.5, "replay_share": 0.1}, {"from": 0.5, "weights": {"es": 1}}]},
        "phases[1].from=0.5: must be greater than the 0.5 of the phase before it",
    ),
    "a phase at the start": ({"phases": [{"from": 0, "weights": {"es": 1}}]}, "phases[0].from=0: input should be greater than 0"),
    "a phase at the end": ({"phases": [{"from": 1.0, "weights": {"es": 1}}]}, "phases[0].from=1.0: input should be less than 1"),
    "a phase without a start": ({"phases": [{"weights": {"es": 1}}]}, "phases[0].from is missing: the share of the run"),
    "a phase of nothing": ({"phases": [{"from": 0.5}]}, "phases[0]: a phase needs weights or replay_share"),
    "a phase of no part": ({"phases": [{"from": 0.5, "weights": {"en": 1}}]}, "phases[0].weights.en: the mixture has no"),
    "a phase of zeros": ({"phases": [{"from": 0.5, "weights": {"es": 0}}]}, "phases[0].weights: all are 0"),
    "a phase of negative weights": ({"phases": [{"from": 0.5, "weights": {"es": -1}}]}, "phases[0].weights={'es': -1}: input"),
    "an infinite phase": ({"phases": [{"from": 0.5, "weights": {"es": float("inf")}}]}, "input should be a finite number"),
    "a misspelt key": ({"phases": [{"from": 0.5, "wieghts": {}}]}, "phases[0]: a phase has no 'wieghts'; did you mean 'weights'"),
    "a share of a phase": ({"phases": [{"from": 0.5, "replay_share": 1}]}, "phases[0].replay_share=1: input should be less"),
    "a phase that is a number": ({"phases": [0.5]}, "phases=[0.5]: input should be a valid dictionary"),
    "a part in a phase": (
        {"phases": [{"from": 0.5, "weights": {"es": {"_target_": "os.system"}}}]},
        "phases[0].weights={'es': {'_target_': 'os.system'}}: input should be a valid number",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_clear_line(name, checked):
    values, says = MISTAKES[name]
    with pytest.raises(UserError) as refused:
        checked(values)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_only_a_mixture_has_weights(checked):
    with pytest.raises(UserError, match=r"phases\[0\].weights: only a mixture has weights: dataset=mixture"):
        checked({"dataset": SAMPLE, "phases": [{"from": 0.5, "weights": {"es": 1}}]})
    with pytest.raises(UserError, match="Python has no 'weights'; it is a key of dataset=mixture"):
        checked({"dataset": SAMPLE | {"weights": {}}})


def test_what_is_allowed(checked):
    config = checked(
        {
            "dataset.weights": {"es": 3, "code": 0, "more": 0.5},
            "dataset.max_epochs": {"code": 0.5},
            "dataset.loss_weights": {"more": 0},
            "dataset.document_mask": True,
            "dataset.parts.es.document_mask": True,
            "replay.share": 0.1,
            "phases": [
                {"from": 0.25, "replay_share": 0},
                {"from": 0.5, "weights": {"code": 1}, "replay_share": None},
                {"from": 0.75, "weights": {"es": 0.5, "code": 0.5}, "replay_share": 0.25},
            ],
        }
    )
    found = [(phase.start, dict(phase.weights), phase.replay_share) for phase in config.training_phases]
    assert found == [(0.25, {}, 0), (0.5, {"code": 1}, None), (0.75, {"es": 0.5, "code": 0.5}, 0.25)]
    assert list(config.dataset.sources()) == ["es", "code", "more/x"]
    assert by_source(config.dataset, "loss_weights", mul) == {"more/x": 0}


DEEP = "dataset.parts.more.parts.x"
FOREIGN = {
    "a foreign class": ({f"{DEEP}._target_": "foreign.run"}, "a config may name pretrain's own parts only"),
    "a function of ours": ({f"{DEEP}._target_": "pretrain.cli.main.main"}, "not a part that is allowed here"),
    "a part of another group": ({f"{DEEP}._target_": "pretrain.strategy.single.Single"}, "not a part that is allowed here"),
    "the base class": ({f"{DEEP}._target_": "pretrain.data.sources.base.Source"}, "not a part that is allowed here"),
    "what a module imports": ({f"{DEEP}._target_": "pretrain.data.sources.local.Path"}, "own parts only"),
    "a partial": ({f"{DEEP}._partial_": True}, "_partial_=True: here it must be false"),
    "arguments": ({f"{DEEP}._args_": ["x"]}, "has no '_args_'"),
    "in the replay": ({"replay.source": {"_target_": "foreign.run"}}, "own parts only"),
    "the replay as a strategy": ({"replay.source": {"_target_": "pretrain.strategy.single.Single"}}, "not a part"),
    "in place of the parts": ({"dataset.parts": {"_target_": "foreign.run"}}, "dataset.parts: each of its items needs a name"),
    "in the weights": ({"dataset.weights": {"_target_": "foreign.run"}}, "dataset.weights={'_target_': 'foreign.run'}: input"),
    "in a part's key": ({f"{DEEP}.name": {"_target_": "foreign.run"}}, f"{DEEP}.name="),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_a_nested_part_is_limited_as_the_dataset_is(name, checked, mark):
    values, says = FOREIGN[name]
    with pytest.raises(UserError) as refused:
        checked(values)
    assert says in str(refused.value)
    assert not mark.exists()


NESTED = ["dataset.parts.es", DEEP, "replay.source", "evaluation.domains.base"]


@pytest.mark.parametrize("path", NESTED)
def test_a_trusted_class_that_is_no_source_is_refused_at_every_place(path, checked):
    with pytest.raises(UserError, match=r"must be a subclass of pretrain\.Source"):
        checked({path: {"_target_": "pathlib.PurePath"}, "allow_targets": ["pathlib"]})
