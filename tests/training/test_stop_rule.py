"""`stop_when`: a run that ends before its last step, exactly there after a resume too; and the best checkpoint exported."""

import pytest
import torch
from safetensors.torch import load_file

from pretrain.checkpoint.train_state import TrainState
from pretrain.config.compose import run_config
from pretrain.runtime.errors import UserError
from pretrain.telemetry.run_file import read_run_file
from pretrain.telemetry.sinks.jsonl import read_records
from pretrain.training.stop_rule import StopWhen
from tests.loops import loop_in
from tests.runs import kill_and_resume


def score(domain, role, loss, delta=None):
    return {"domain": domain, "role": role, "loss": loss, "delta_loss": delta}


def evaluated(rule, *losses, **scores):
    """The state after evaluations with these losses of the new domain `a`."""
    state = TrainState()
    for step, loss in enumerate(losses):
        state.step, state.scores = (
            step,
            [score("a", "new", loss), score("b", "base", **scores)] if scores else [score("a", "new", loss)],
        )
        rule.note_evaluation(state)
    return state


@pytest.mark.parametrize(
    ("rule", "losses", "stops"),
    [
        ({"patience": 2}, [3, 2, 1, 1, 1], True),
        ({"patience": 2}, [3, 2, 2], False),
        ({"patience": 2}, [3, 2, 2.5, 1.9, 1.95], False),
        ({"patience": 1, "min_improvement": 0.2}, [3, 2, 1.9], True),
        ({"patience": 1, "min_improvement": 0.2}, [3, 2, 1.7], False),
        ({"patience": 2, "min_improvement": 0.2}, [3, 2.9, 2.7], False),  # small steps add up
        ({"patience": 1}, [3, None], False),  # a loss that is not finite is the guard's matter
        ({}, [1, 2, 3], False),
    ],
    ids=range(8),
)
def test_patience(rule, losses, stops):
    rule = StopWhen(**rule)
    reason = rule.reason(evaluated(rule, *losses))
    assert (reason is not None) == stops
    if stops:
        assert "the loss of the new domains has had no new low in" in reason


def test_patience_of_one_domain():
    rule = StopWhen(patience=1, domain="b")
    assert rule.reason(evaluated(rule, 3, 2, 1, loss=5.0)).startswith("the loss of b has had no new low in 2")


def test_limits():
    state = TrainState(step=5, tokens=100, scores=[score("a", "base", 1.0, 0.05), score("b", "base", 1.0, 0.15)])
    assert StopWhen(forgetting=0.09).reason(state) == "forgetting is +0.1000, above 0.09 nats per token"
    assert StopWhen(forgetting=0.11).reason(state) is None
    assert StopWhen(tokens=100).reason(state) == "tokens=100 are trained"
    assert StopWhen(tokens=101).reason(state) is None
    state.pending_evaluation = True
    assert StopWhen(forgetting=0.0).reason(state) is None, "the scores are those of an earlier step"
    assert StopWhen(tokens=100).reason(state) is not None


def test_hours_are_what_the_ranks_have_agreed_on():
    rule, state = StopWhen(hours=1.0), TrainState(step=1)
    assert rule.is_over(3600.0)
    rule.note_seconds(state, 4000.0, over=False)
    assert rule.reason(state) is None, "this rank's clock alone does not decide"
    rule.note_seconds(state, 3599.0, over=True)
    assert rule.reason(state) == "hours=1 have passed"
    StopWhen().note_seconds(state, 5.0, over=False)
    assert state.seconds == 3600.0, "without a budget nothing is noted"


def test_it_evaluates_saves_and_exports_where_it_ends(tmp_path):
    loop = loop_in(tmp_path)
    trainer, events, _ = loop(stop_when=StopWhen(patience=1))
    trainer.run()
    assert trainer.state.step == 3, "each of these evaluations is worse than the one before"
    assert trainer.complete
    assert trainer.exporter.when[-1] == ("end", 3)
    assert trainer.checkpoints.writer.store.complete_steps()[-1] == 3
    assert events[-1].status == "finished"
    assert events[-1].stopped_by == "the loss of the new domains has had no new low in 1 evaluations (lowest: 2.5000)"
    budget, events, _ = loop(stop_when=StopWhen(tokens=100), run="budget")
    budget.run()
    per_step = events[1].step_tokens if hasattr(events[1], "step_tokens") else 32
    assert budget.state.step == -(-100 // per_step)
    assert budget.state.evaluated_at == budget.state.step
    hours, events, _ = loop(stop_when=StopWhen(hours=1e-9), run="hours")
    hours.run()
    assert hours.state.step == 1
    assert events[-1].stopped_by == "hours=1e-09 have passed"


STOPPING = ["lr=1e-1", "scheduler=constant", "max_steps=200", "evaluate_every=2", "save_every=2", "warmup_proportion=0"]
STOPPING += ["evaluation.samples=0", "gradient_accumulation_steps=1", "sink=[jsonl]", "evaluation.max_tokens=50"]
BEST = ["checkpoint.export=best", "checkpoint.keep_best=1", "checkpoint.keep_last=null", "stop_when.patience=2"]


def test_a_run_ends_and_exports_its_best(base_arguments, command, tmp_path):
    run = tmp_path / "run"
    words = [*base_arguments, *STOPPING, *BEST, f"output_dir={run}"]
    code, _, err = command(words)
    assert code == 0, err
    new = {
        r["step"]: r["loss"]
        for r in read_records(run / "metrics.jsonl")
        if r["event"] == "evaluation" and r["role"] == "new"
    }
    last, best = max(new), min((step for step in new if step), key=new.get)
    assert last < 200
    assert [new[step] > min(new[s] for s in new if s < step) for step in (last - 2, last)] == [True, True]
    facts = read_run_file(run)
    assert (facts["status"], facts["steps"], facts["total_steps"]) == ("finished", last, 200)
    assert facts["stopped_by"].startswith("the loss of the new domains has had no new low in 2 evaluations")
    assert f"the run ends at step {last} of 200" in err
    assert f"checkpoint.export=best: the model of step {best} is exported" in err
    ours, theirs = (
        load_file(f) for f in (run / "model/model.safetensors", run / f"checkpoints/step-{best:08d}/model.safetensors")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert f"step {best} of 200" in (run / "model/README.md").read_text()
    code, _, err = command(words)
    assert code == 0
    assert f"{run} is finished: {last} steps" in err
    assert "ended before its last step by stop_when: the loss" in err
    code, _, err = command([*words, "stop_when.patience=3", f"max_steps={last + 1}"])
    assert code == 0, err
    assert read_run_file(run)["steps"] == last + 1, "with a higher limit it is continued"


@pytest.mark.slow
def test_a_resume_ends_at_the_same_step(base_arguments, command, spawn, tmp_path):
    words = [*base_arguments, "stop_when.tokens=2000", "max_steps=200", "stop_when.patience=9"]
    assert command([*words, f"output_dir={tmp_path / 'whole'}"])[0] == 0
    whole = read_run_file(tmp_path / "whole")["steps"]
    kill_and_resume(words, tmp_path / "killed", command, spawn, at=7)
    assert read_run_file(tmp_path / "killed")["steps"] == whole
    assert read_run_file(tmp_path / "killed")["stopped_by"] == "tokens=2,000 are trained"


@pytest.mark.parametrize(
    ("rule", "domains", "message"),
    [
        ({"domain": "x"}, {"x": "new"}, "stop_when.domain=x: has no effect without stop_when.patience"),
        (
            {"domain": "lat", "patience": 1},
            {"law": "new"},
            "stop_when.domain=lat: no such domain is evaluated; did you mean 'law'",
        ),
        ({"patience": 1}, {"law": "base"}, "the new domain is not evaluated; name another with stop_when.domain"),
        ({"forgetting": 0.1}, {"law": "new"}, "stop_when.forgetting=0.1: no base domain is evaluated"),
    ],
    ids=range(4),
)
def test_rules_that_nothing_decides(rule, domains, message):
    with pytest.raises(UserError, match=message):
        StopWhen(**rule).check(domains)


def test_bad_input():
    with pytest.raises(UserError, match="StopWhen has no 'patiense'; did you mean 'patience'"):
        run_config(["stop_when.patiense=2"])
    with pytest.raises(UserError, match="both say which model is exported"):
        run_config(["checkpoint.export=best", "merge.curve=[0,1]", "merge.choose='gain>=0'"])
    from pretrain.checkpoint.config import CheckpointConfig

    with pytest.raises(UserError, match=r"checkpoint.export=best: needs checkpoint.keep_best=1"):
        CheckpointConfig(export="best").check({"a": "new"})
