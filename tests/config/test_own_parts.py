"""Parts of other people's packages: chosen from a folder of configs, trusted on the command line, built in order."""

import pytest

from pretrain.config.compose import run_config
from pretrain.evaluation.task import EvaluationTask, Metric
from pretrain.models.transforms.base import ModelTransform
from pretrain.runtime.errors import UserError
from pretrain.training.hook import Hook

PARTS = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Freeze:
    pattern: str = "wte"
    def apply(self, model): pass

@dataclass(frozen=True)
class Lora:
    rank: int = 4
    def apply(self, model): pass

@dataclass
class Ema:
    decay: float = 0.99

class Accuracy:
    def __init__(self, questions: int = 3): self.questions = questions
"""
FILES = {
    "transform/freeze.yaml": "# Freeze parameters.\nfreeze: {_target_: ourlab.parts.Freeze, pattern: wte}\n",
    "transform/lora.yaml": "# LoRA.\nlora: {_target_: ourlab.parts.Lora, rank: 8}\n",
    "hook/ema.yaml": "# Average.\nema: {_target_: ourlab.parts.Ema, decay: 0.9}\n",
}
TRUSTED = "allow_targets=[ourlab]"


@pytest.fixture
def conf(tmp_path, monkeypatch):
    """The folder of configs; the package is importable."""
    for name, text in {"ourlab/__init__.py": "", "ourlab/parts.py": PARTS, **FILES}.items():
        file = tmp_path / ("" if name.startswith("ourlab") else "conf") / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    return str(tmp_path / "conf")


def test_none_are_chosen_by_default():
    config = run_config([])
    assert (config.transforms, config.build_hooks(), config.evaluation.tasks) == ((), {}, {})
    assert "transform" not in config.plain


def test_they_are_built_in_the_order_of_the_list(conf):
    config = run_config(["transform=[lora,freeze]", "hook=[ema]", "transform.lora.rank=2", TRUSTED], conf)
    assert [type(part).__name__ for part in config.transforms] == ["Lora", "Freeze"]
    assert config.transforms[0].rank == 2
    assert [hook.decay for hook in config.build_hooks().values()] == [0.9]
    config = run_config(["transform=[freeze,lora]", TRUSTED], conf)
    assert [type(part).__name__ for part in config.transforms] == ["Freeze", "Lora"]


def test_tasks_of_an_evaluation(conf):
    config = run_config(["evaluation.tasks.quiz={_target_: ourlab.parts.Accuracy, questions: 5}", TRUSTED], conf)
    assert {name: task.questions for name, task in config.evaluation.tasks.items()} == {"quiz": 5}


MISTAKES = {
    "untrusted": (["transform=[lora]"], r"transform\.lora\._target_='ourlab\.parts\.Lora': .*allow_targets=\[ourlab"),
    "untrusted hook": (["hook=[ema]"], r"hook\.ema\._target_=.*allow_targets"),
    "untrusted task": (["evaluation.tasks.quiz._target_=ourlab.parts.Accuracy"], r"evaluation\.tasks\.quiz\._target_="),
    "not chosen": (["transform.lora.rank=2"], r"transform\.lora: 'lora' is not among the chosen transforms; add it"),
    "a key of none": (["hook=[ema]", "hook.ema.decai=1", TRUSTED], r"hook\.ema: Ema has no 'decai'.*decay"),
    "wrong type": (["transform=[lora]", "transform.lora.rank=x", TRUSTED], r"transform\.lora\.rank='x'"),
    "ours of another kind": (
        ["evaluation.tasks.x._target_=pretrain.telemetry.sinks.csv.Csv"],
        "those of .*EvaluationTask",
    ),
    "a task's key": (["evaluation.tasks.x={_target_: ourlab.parts.Accuracy, asks: 5}", TRUSTED], r"has no 'asks'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(conf, name):
    words, message = MISTAKES[name]
    with pytest.raises(UserError, match=message):
        run_config(words, conf)


def test_a_choice_where_there_is_none():
    with pytest.raises(UserError, match="transform: none of its choices is shipped"):
        run_config(["transform=[lora]"])


def test_the_base_classes():
    """What a subclass need not write: an export that returns the weights as they are, and the facts of a metric."""

    class Freeze(ModelTransform):
        def apply(self, model):
            pass

    weights = {"a": 1}
    assert Freeze().export(weights) is weights
    assert Metric("accuracy", 0.5) == Metric("accuracy", 0.5, unit="", better="lower", domain=None, stderr=None)
    for base in (ModelTransform, Hook, EvaluationTask):
        with pytest.raises(TypeError, match="abstract"):
            base()
