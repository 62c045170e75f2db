"""Parts of other people's packages: chosen from a folder of configs, trusted on the command line, built in order."""

import pytest

from pretrain.config.compose import run_config
from pretrain.evaluation.task import EvaluationTask, Metric
from pretrain.models.transforms.base import ModelTransform
from pretrain.run.build import build_schedule
from pretrain.run.fingerprint import changed_settings
from pretrain.runtime.errors import UserError
from pretrain.training.hook import Hook

TRUSTED = "allow_targets=[ourlab]"


def test_none_are_chosen_by_default():
    config = run_config([])
    assert (config.transforms, config.build_hooks(), config.evaluation.tasks) == ((), {}, {})
    assert "transform" not in config.plain


def test_they_are_built_in_the_order_of_the_list(conf):
    config = run_config(["transform=[adapter,still]", "hook=[average]", "transform.adapter.rank=2", TRUSTED], conf)
    assert [type(part).__name__ for part in config.transforms] == ["Lora", "Freeze"]
    assert config.transforms[0].rank == 2
    assert [hook.decay for hook in config.build_hooks().values()] == [0.9]
    config = run_config(["transform=[still,adapter]", TRUSTED], conf)
    assert [type(part).__name__ for part in config.transforms] == ["Freeze", "Lora"]


def test_any_key_of_a_class_that_takes_any(conf):
    task = "evaluation.tasks.x={_target_: ourlab.parts.Anything, url: here, a: 1}"
    assert run_config([task, TRUSTED]).evaluation.tasks["x"].options == {"a": 1}


def test_tasks_of_an_evaluation(conf):
    config = run_config(["evaluation.tasks.quiz={_target_: ourlab.parts.Accuracy, questions: 5}", TRUSTED], conf)
    assert {name: task.questions for name, task in config.evaluation.tasks.items()} == {"quiz": 5}


MISTAKES = {
    "untrusted": (
        ["transform=[adapter]"],
        r"transform\.adapter\._target_='ourlab\.parts\.Lora': .*allow_targets=\[ourlab",
    ),
    "untrusted hook": (["hook=[average]"], r"hook\.average\._target_=.*allow_targets"),
    "untrusted task": (["evaluation.tasks.quiz._target_=ourlab.parts.Accuracy"], r"evaluation\.tasks\.quiz\._target_="),
    "not chosen": (
        ["transform.adapter.rank=2"],
        r"transform\.adapter: 'adapter' is not among the chosen transforms; add it",
    ),
    "a key of none": (["hook=[average]", "hook.average.decai=1", TRUSTED], r"hook\.average: Ema has no 'decai'.*decay"),
    "wrong type": (["transform=[adapter]", "transform.adapter.rank=x", TRUSTED], r"transform\.adapter\.rank='x'"),
    "ours of another kind": (
        ["evaluation.tasks.x._target_=pretrain.telemetry.sinks.csv.Csv"],
        "those of .*EvaluationTask",
    ),
    "not a dataset": (
        ["dataset._target_=ourlab.parts.Anything", TRUSTED],
        r"dataset\._target_='ourlab\.parts\.Anything': must be a subclass of pretrain.Source",
    ),
    "not a transform": (
        ["transform=[adapter]", "transform.adapter._target_=ourlab.parts.Ema", TRUSTED],
        r"transform\.adapter\._target_='ourlab\.parts\.Ema': lacks apply, which pretrain\.ModelTransform describes",
    ),
    "an abstract transform": (
        ["transform=[adapter]", "transform.adapter._target_=ourlab.parts.Unfinished", TRUSTED],
        r"transform\.adapter\._target_='ourlab\.parts\.Unfinished': lacks apply, which pretrain\.ModelTransform describes",
    ),
    "not a hook": (
        ["hook=[average]", "hook.average._target_=ourlab.parts.Freeze", TRUSTED],
        r"hook\.average\._target_='ourlab\.parts\.Freeze': lacks after_step and load_state_dict and setup and state_dict, which",
    ),
    "not a strategy": (["strategy._target_=ourlab.parts.Ema", TRUSTED], "must be a subclass of pretrain.Strategy"),
    "not a sink": (
        ["sink=[jsonl]", "sink.jsonl._target_=ourlab.parts.Ema", TRUSTED],
        r"sink\.jsonl\._target_='ourlab\.parts\.Ema': lacks close and open and write",
    ),
    "not a task": (
        ["evaluation.tasks.x={_target_: ourlab.parts.Ema}", TRUSTED],
        r"evaluation\.tasks\.x\._target_='ourlab\.parts\.Ema': lacks evaluate",
    ),
    "not a checkpoint": (["checkpoint._target_=ourlab.parts.Ema", TRUSTED], "must be a subclass of .*CheckpointConfig"),
    "a misspelt class": (
        ["dataset._target_=ourlab.parts.Qery", TRUSTED],
        r"dataset\._target_='ourlab\.parts\.Qery': .*Qery",
    ),
    "a task's key": (["evaluation.tasks.x={_target_: ourlab.parts.Accuracy, asks: 5}", TRUSTED], r"has no 'asks'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(conf, name, caplog):
    words, message = MISTAKES[name]
    with pytest.raises(UserError, match=message) as raised:
        run_config(words, conf)
    assert "\n" not in str(raised.value)
    assert not caplog.records, "one line, and none of Hydra's"


def test_a_schedule_without_numbers_is_refused_before_the_run(conf):
    target = "scheduler={_target_: ourlab.parts.undefined, _partial_: true}"
    config = run_config([target, TRUSTED], conf)
    with pytest.raises(UserError, match="scheduler: undefined returns nan for step 0 of 10; a number is needed"):
        build_schedule(config, 10)


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


def optimizer(words, conf=None):
    return run_config([*words, "lr=0.1"], conf).plain["optimizer"]


OF_LION = {"_target_": "ourlab.Lion", "lr": 0.1, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1}
TARGETS = {  # words → the optimizer's node
    "a class takes what refers to the run's keys, and none of AdamW's constants": (
        ["optimizer._target_=ourlab.Lion", TRUSTED],
        OF_LION,
    ),
    "keys of the command line stay": (
        ["optimizer._target_=ourlab.Lion", "optimizer.eps=2.0", "optimizer.beta1=0.7", TRUSTED],
        OF_LION | {"beta1": 0.7, "eps": 2.0},
    ),
    "the same value as in the YAML stays": (
        ["optimizer._target_=ourlab.Lion", "optimizer.eps=1e-8", TRUSTED],
        OF_LION | {"eps": 1e-8},
    ),
    "the same value inside of a word stays": (
        ["optimizer={_target_: ourlab.Lion, eps: 1e-8}", TRUSTED],
        OF_LION | {"eps": 1e-8},
    ),
    "a class of torch": (
        ["optimizer._target_=torch.optim.Adafactor", "allow_targets=[torch.optim]"],
        {"_target_": "torch.optim.Adafactor", "lr": 0.1, "weight_decay": 0.1},
    ),
    "betas": (
        ["optimizer._target_=torch.optim.AdamW", "allow_targets=[torch.optim.AdamW]", "beta1=0.8"],
        {"_target_": "torch.optim.AdamW", "lr": 0.1, "weight_decay": 0.1, "betas": [0.8, 0.95]},
    ),
    "a function": (
        ["optimizer._target_=ourlab.parts.both", TRUSTED],
        {"_target_": "ourlab.parts.both", "lr": 0.1, "weight_decay": 0.1},
    ),
}


@pytest.mark.parametrize("name", TARGETS)
def test_another_class(conf, name):
    words, node = TARGETS[name]
    assert optimizer(words) == node


def test_another_class_from_an_experiment(conf, tmp_path):
    file = tmp_path / "conf/experiment/ours.yaml"
    file.parent.mkdir()
    file.write_text("# @package _global_\noptimizer: {_target_: ourlab.Lion, eps: 3.0}\n")
    assert optimizer(["experiment=ours", TRUSTED], conf) == OF_LION | {"eps": 3.0}
    file.write_text("# @package _global_\noptimizer: {_target_: ourlab.Lion, fused: 3.0}\n")
    with pytest.raises(UserError, match="Lion has no 'fused'"):
        run_config(["experiment=ours", TRUSTED], conf)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optimizer._target_=ourlab.Lion", "optimizer.fused=false", TRUSTED], "Lion has no 'fused'"),
        (["optimizer._target_=ourlab.Lion", "optimizer.ep=1", TRUSTED], "Lion has no 'ep'; did you mean 'eps'"),
        (["optimizer._target_=ourlab.Lion"], "optimizer._target_='ourlab.Lion': .*'allow_targets="),
        (["optimizer._target_=ourlab.os.system", TRUSTED], "optimizer._target_='ourlab.os.system'"),
        (["optimizer=lion", "optimizer.fused=true", TRUSTED], "Lion has no 'fused'; it is a key of optimizer=adamw"),
        (
            ["optimizer._target_=ourlab.parts.both", "optimizer.named_parameters=1", TRUSTED],
            "has no 'named_parameters'",
        ),
    ],
)
def test_a_typo_stays_an_error(conf, words, message):
    with pytest.raises(UserError, match=message):
        run_config(words, conf)


def test_another_class_in_other_groups(conf):
    words = [
        "dataset=local",
        "dataset._target_=ourlab.parts.Query",
        "dataset.url=there",
        "dataset.port=3",
        "scheduler._target_=ourlab.parts.half",
    ]
    config = run_config([*words, "scheduler.ratio=0.25", "evaluation=new_only", TRUSTED])
    expected = {"_target_": "ourlab.parts.Query", "url": "there", "port": 3}
    assert config.plain["dataset"] == expected
    assert (config.dataset.domain, config.dataset.held_out) == ("query", 0.05)
    assert config.scheduler(1, total_steps=4, warmup_steps=0) == 0.25
    strategy = run_config(["strategy=fsdp", "strategy._target_=pretrain.strategy.ddp.Ddp"]).plain["strategy"]
    assert strategy == {"_target_": "pretrain.strategy.ddp.Ddp"}
    sinks = run_config(["sink=[console,wandb]", "sink.wandb._target_=ourlab.parts.Lines", TRUSTED]).plain["sink"]
    assert sinks["wandb"] == {"_target_": "ourlab.parts.Lines"}
    assert sinks["console"]["level"] == 3


def test_a_plain_class_of_torch_trains():
    torch = pytest.importorskip("torch")
    words = ["optimizer._target_=torch.optim.Adafactor", "allow_targets=[torch.optim]", "weight_decay=0.2"]
    factory = run_config([*words, "lr=0.1"]).optimizer
    matrix, bias, frozen = (torch.nn.Parameter(torch.ones(shape)) for shape in ((2, 2), (2,), (3, 3)))
    frozen.requires_grad_(False)
    made = factory([("a", matrix), ("b", bias), ("c", frozen)])
    assert isinstance(made, torch.optim.Adafactor)
    assert [(group["params"], group["weight_decay"], group["lr"]) for group in made.param_groups] == [
        ([matrix], 0.2, 0.1),
        ([bias], 0.0, 0.1),
    ]


def test_a_function_is_bound_and_its_arguments_may_be_parts(conf):
    words = ["optimizer._target_=ourlab.parts.both", TRUSTED, "lr=0.1"]
    nested = "optimizer.parts=[{_target_: ourlab.parts.Lion, lr: 1.0}, {_target_: ourlab.parts.Accuracy}]"
    wrap = "optimizer.wrap={_target_: ourlab.parts.half, _partial_: true, ratio: 0.1}"
    factory = run_config([*words, nested, wrap]).optimizer
    lr, weight_decay, parts, half = factory([])
    assert (lr, weight_decay, parts[0].lr, parts[1].questions) == (0.1, 0.1, 1.0, 3)
    assert half(1, total_steps=1, warmup_steps=1) == 0.1
    with pytest.raises(UserError, match=r"optimizer\.parts\.0\._target_='os\.system'"):
        run_config([*words, "optimizer.parts=[{_target_: os.system}]"])
    with pytest.raises(UserError, match=r"optimizer\.parts\.0: Lion has no 'lrr'"):
        run_config([*words, "optimizer.parts=[{_target_: ourlab.parts.Lion, lr: 1.0, lrr: 2}]"])


def test_a_group_of_their_own(conf):
    words = ["ourlab=default", "dataset=local", "dataset.nameOrPath=${ourlab.url}/x"]
    config = run_config(words, conf)
    assert (config.plain["ourlab"], config.plain["dataset"]["nameOrPath"]) == (
        {"url": "here", "sizes": [1, 2]},
        "here/x",
    )
    assert run_config([*words, "ourlab.url=there"], conf).plain["dataset"]["nameOrPath"] == "there/x"


def test_a_group_of_their_own_counts_where_it_is_used(conf):
    """A finished run is the same run with another value that nothing refers to."""
    words = ["dataset=local", "dataset.nameOrPath=x", "+ourlab=default", "max_steps=3"]
    before, after = run_config(words, conf), run_config([*words, "ourlab.url=there"], conf)
    assert changed_settings(before.plain, after.plain) == []
    words.append("grad_clip=${ourlab.sizes.0}")
    after = run_config([*words, "ourlab.sizes.0=5.0"], conf)
    assert changed_settings(run_config([*words, "ourlab.sizes.0=1.0"], conf).plain, after.plain) == [
        "grad_clip: 1.0 → 5.0"
    ]
