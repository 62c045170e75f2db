"""Evaluation tasks: how they are run, and what of their metrics is accepted."""

import random

import numpy as np
import pytest
import torch

from pretrain import Metric, UserError
from pretrain.evaluation.run_tasks import run_tasks
from tests.engines import engine_of
from tests.tasks import Accuracy, Broken, Mistaken


def returning(*metrics):
    class Task:
        def evaluate(self, engine):
            return metrics[0] if len(metrics) == 1 and not isinstance(metrics[0], Metric) else list(metrics)

    return Task()


def run(*metrics):
    return run_tasks({"mine": returning(*metrics)}, engine_of())


def test_numbers_become_floats():
    found = run(
        Metric("a", torch.tensor(0.5)),
        Metric("b", np.float32(2)),
        Metric("c", 3, stderr=np.int64(1)),
        Metric("d", 10**400),
    )
    assert [(m.value, m.stderr) for m in found] == [(0.5, None), (2.0, None), (3.0, 1.0), (float("inf"), None)]
    assert all(type(m.value) is float for m in found)


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ((None,), "evaluate() returned NoneType None, not a list of pretrain.Metric"),
        ((0.5,), "returned float 0.5, not a list"),
        (([("accuracy", 0.5)],), "returned list [('accuracy', 0.5)], not a list"),
        ((Metric("a/b", 1.0),), "metric name 'a/b': a name is text in one line without '/'"),
        ((Metric("", 1.0),), "metric name ''"),
        ((Metric("a\nb", 1.0),), r"metric name 'a\nb'"),
        ((Metric(" a", 1.0),), "metric name ' a'"),
        ((Metric(3, 1.0),), "metric name 3"),
        ((Metric("a", "1"),), "metric a: value=str '1': not a number"),
        ((Metric("a", None),), "metric a: value=NoneType None: not a number"),
        ((Metric("a", torch.zeros(2)),), "metric a: value=Tensor tensor([0., 0.]): not a number"),
        ((Metric("a", 1.0, stderr="x"),), "metric a: stderr=str 'x': not a number"),
        ((Metric("a", 1.0, better="more"),), "metric a: better='more': allowed: lower, higher"),
        ((Metric("a", 1.0, domain=""),), "metric a: domain='': the name of a domain, or None"),
        (
            (Metric("a", 1.0), Metric("a", 2.0)),
            "metric a is measured twice, first by evaluation.tasks.mine; rename one",
        ),
        ((Metric("a", 1.0, domain="es"), Metric("a", 2.0, domain="es")), "metric a of domain es is measured twice"),
    ],
)
def test_what_can_not_be_recorded_is_one_line(metrics, said):
    with pytest.raises(UserError) as caught:
        run(*metrics)
    assert str(caught.value).startswith("evaluation.tasks.mine: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_same_metric_of_two_domains_or_two_tasks():
    a, b = Metric("a", 1.0, domain="es"), Metric("a", 2.0)
    assert run(a, b) == [a, b]
    with pytest.raises(
        UserError, match=r"evaluation\.tasks\.two: metric a is measured twice, first by evaluation\.tasks\.one"
    ):
        run_tasks({"one": returning(b), "two": returning(b)}, engine_of())


def test_nothing_of_the_training_changes():
    engine = engine_of()
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    expected = torch.rand(2), random.random(), np.random.rand()
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    assert engine.model.training
    first, second, _ = run_tasks({"accuracy": Accuracy(4)}, engine)
    assert (first.name, first.better, first.stderr, second.value) == ("accuracy", "higher", 0.25, 4.0)
    assert engine.model.training
    assert torch.is_grad_enabled()
    assert (torch.equal(torch.rand(2), expected[0]), random.random(), np.random.rand()) == (True, *expected[1:])
    assert all(p.grad is None for p in engine.model.parameters())


def test_errors_and_stop_signals():
    engine, called = engine_of(), []
    with pytest.raises(UserError, match="the questions are missing"):
        run_tasks({"mine": Mistaken()}, engine)
    with pytest.raises(KeyError):
        run_tasks({"mine": Broken()}, engine)
    assert engine.model.training
    given = {"one": returning(Metric("a", 1.0)), "two": Broken()}
    stops = iter([False, True])
    assert run_tasks(given, engine, interrupted=lambda: next(stops), alive=lambda: called.append(1)) is None
    assert called == [1], "the first was run, the second not"
    assert run_tasks({}, engine) == []
