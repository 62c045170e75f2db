"""`merge.curve`: points between the base model and the result of a run, scored at its end, and the one that is exported."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from pretrain.config.compose import run_config
from pretrain.config.quoting import quoted_word
from pretrain.distributed.sharding import TensorFiles
from pretrain.launch.library import train
from pretrain.merging.choice import Change, Choice
from pretrain.merging.curve import Curve
from pretrain.models.language_model import LanguageModel
from pretrain.runtime.errors import UserError
from pretrain.strategy.replaced import EngineWeights
from pretrain.telemetry.history import History
from pretrain.telemetry.report.plots import merge_chart
from pretrain.telemetry.run_file import read_run_file
from pretrain.telemetry.sinks.jsonl import read_records
from tests.models.tiny import tiny

CURVE = ["merge.curve=[0,0.25,1]", "merge.choose=forgetting<=-1e9"]


def words_of(base_arguments, **changes):
    small = {
        "max_steps": 4,
        "evaluate_every": "null",
        "save_every": "null",
        "lr": "1e-2",
        "gradient_accumulation_steps": 1,
    }
    return [*base_arguments, *(f"{key}={value}" for key, value in (small | changes).items())]


def merges(run):
    return {(r["alpha"], r["domain"]): r for r in read_records(run / "metrics.jsonl") if r["event"] == "merge"}


def evaluations(run, step):
    found = [r for r in read_records(run / "metrics.jsonl") if r["event"] == "evaluation" and r["step"] == step]
    return {r["domain"]: r["loss"] for r in found}


@pytest.fixture
def run(tmp_path, base_arguments):
    words = [
        *words_of(base_arguments),
        "merge.curve=[1,0,0.25]",
        "merge.choose=gain>=-100",
        f"output_dir={tmp_path / 'run'}",
    ]
    return train(run_config([quoted_word(word, sweeping=False) for word in words])).folder


def test_the_points_and_the_choice(run, tiny_model, base_arguments, command, tmp_path):
    scores = merges(run)
    assert len(scores) == 6
    before, after = evaluations(run, 0), evaluations(run, 4)
    for domain in before:
        assert scores[0.0, domain]["loss"] == before[domain], "the base model, to the last bit"
        assert scores[1.0, domain]["loss"] == after[domain]
        assert scores[0.25, domain]["delta_loss"] == scores[0.25, domain]["loss"] - before[domain]
    base, result = (
        load_file(tiny_model / "model.safetensors"),
        load_file(run / "checkpoints/step-00000004/model.safetensors"),
    )
    forgetting = {alpha: scores[alpha, "other"]["delta_loss"] for alpha in (0.0, 0.25, 1.0)}
    chosen = min(forgetting, key=forgetting.get)
    assert {alpha for alpha, _ in scores if scores[alpha, "other"]["chosen"]} == {chosen}
    assert read_run_file(run)["merge_alpha"] == chosen
    exported = load_file(run / "model/model.safetensors")
    for name, tensor in exported.items():
        expected = chosen * result[name] + (1 - chosen) * base[name]
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-7)
    if chosen not in (0, 1):
        assert not torch.equal(exported["model.norm.weight"], result["model.norm.weight"])
    assert f"The weights are {chosen:g} × the run's result" in (run / "model/README.md").read_text()
    chart = merge_chart(History(read_records(run / "metrics.jsonl")))
    assert all(f">{alpha}</text>" in chart for alpha in ("0", "0.25", "1"))
    assert "0.25 at" in chart
    code, _, err = command([*words_of(base_arguments), "merge.curve=[0,1]", f"output_dir={run}"])
    assert code == 2, "a finished run has no other curve"
    assert "merge.curve: [1, 0, 0.25] → [0, 1]" in err


def test_training_is_the_same_and_without_a_point_the_result_is_exported(base_arguments, command, tmp_path):
    plain, run = tmp_path / "plain", tmp_path / "run"
    assert command([*words_of(base_arguments), f"output_dir={plain}"])[0] == 0
    code, _, err = command([*words_of(base_arguments), *CURVE, f"output_dir={run}"])
    assert code == 0, err
    assert "merge.choose: no point of merge.curve has forgetting <= -1e+09; the result itself is exported" in err
    ours, theirs = (load_file(folder / "model/model.safetensors") for folder in (run, plain))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert {alpha for alpha, _ in merges(run) if merges(run)[alpha, "other"]["chosen"]} == {1.0}


def test_the_weights_of_a_point_are_listed_a_fixed_number_of_times(tmp_path, monkeypatch):
    """And not once for each of them, which would take time quadratic in their number."""
    model, listed = LanguageModel(tiny("llama")), []
    own = {name: tensor.detach().clone() for name, tensor in model.hf_state().items()}
    save_file({name: tensor + 1 for name, tensor in own.items()}, tmp_path / "base")
    curve = Curve((0.25,), None, TensorFiles([tmp_path / "base"]), untouched=None)
    keep = LanguageModel.hf_state
    monkeypatch.setattr(LanguageModel, "hf_state", lambda self: listed.append(1) or keep(self))
    engine = SimpleNamespace(model=model)
    engine.weights = EngineWeights(engine)
    with curve.weights_at(engine, 0.25):
        for name, tensor in keep(model).items():
            torch.testing.assert_close(tensor.detach(), own[name] + 0.75)
    assert all(torch.equal(tensor, own[name]) for name, tensor in keep(model).items())
    assert len(listed) == 3


POINTS = [Change(0.0, 0.0, 0.0), Change(0.5, -0.3, 0.04), Change(0.75, -0.35, 0.05), Change(1.0, -0.4, 0.2)]


@pytest.mark.parametrize(
    ("text", "alpha"),
    [
        ("forgetting<=0.05", 0.75),
        (" forgetting <= .045 ", 0.5),
        ("forgetting<=1", 1.0),
        ("forgetting<=-1", None),
        ("gain>=0.3", 0.5),
        ("gain>=3.5e-1", 0.75),
        ("gain>=1", None),
    ],
)
def test_what_is_chosen(text, alpha):
    best = Choice.of(text).best(POINTS)
    assert (best and best.alpha) == alpha
    assert Choice.of(text).best([Change(0.5, None, 0.0), Change(0.6, -1.0, None)]) is None, "nothing is known"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["merge.choose=forgetting<=1"],
            "merge.choose=forgetting<=1: chooses a point of merge.curve, which is not given",
        ),
        (["merge.curve=[0.5]"], "needs at least two different numbers"),
        (["merge.curve=[0,0.5,0.5]"], "each once"),
        (["merge.along=checkpoints"], r"merge.along=checkpoints: needs merge.curve"),
        (["merge.along=checkpoint"], "merge.along=.*did you mean 'checkpoints'"),
        (["merge.curve=[0,2]"], "merge.curve.*less than or equal to 1"),
        (
            ["merge.curve=[0,1]", "merge.choose=forgeting<=1"],
            "nothing is called 'forgeting'; did you mean 'forgetting'",
        ),
        (["merge.curve=[0,1]", "merge.choose=forgetting>=1"], "forgetting is limited with <="),
        (["merge.curve=[0,1]", "merge.choose=__import__(os)"], "write 'forgetting<=0.05' or 'gain>=0.1'"),
    ],
    ids=range(9),
)
def test_bad_input(words, message):
    with pytest.raises(UserError, match=message):
        run_config([quoted_word(word, sweeping=False) for word in words])


def test_a_model_without_a_base(base_arguments, command, tmp_path):
    code, _, err = command([*words_of(base_arguments), "model=scratch", *CURVE, f"output_dir={tmp_path}"])
    assert code == 2
    assert "merge.curve: needs the weights of a base model in files" in err


def test_along_the_checkpoints(base_arguments, command, tmp_path):
    """Each stands for the result: at 1 it has the scores of its own step, to the last bit, and one of them is exported."""
    words = [*words_of(base_arguments, save_every=2, evaluate_every=2, max_steps=6, **{"checkpoint.keep_last": 3})]
    words += ["merge.along=checkpoints", "merge.curve=[0.5,1]", "merge.choose=gain>=-100", f"output_dir={tmp_path}"]
    code, _, err = command(words)
    assert code == 0, err
    assert "scoring 6 points between the base model and 2 checkpoints and the result" in err
    records = [r for r in read_records(tmp_path / "metrics.jsonl") if r["event"] == "merge"]
    scores = {(r["checkpoint"], r["alpha"], r["domain"]): r for r in records}
    assert [k[:2] for k in scores][::2] == [(2, 0.5), (2, 1.0), (4, 0.5), (4, 1.0), (None, 0.5), (None, 1.0)]
    for step in (2, 4):
        for domain, loss in evaluations(tmp_path, step).items():
            assert scores[step, 1.0, domain]["loss"] == loss
    forgetting = {key[:2]: r["delta_loss"] for key, r in scores.items() if key[2] == "other"}
    chosen = min(forgetting, key=forgetting.get)
    facts = read_run_file(tmp_path)
    assert (facts["merge_checkpoint"], facts["merge_alpha"]) == chosen
    assert {k[:2] for k, r in scores.items() if r["chosen"]} == {chosen}
    if chosen[0] is not None:
        assert f"{chosen[1]:g} × step {chosen[0]} + " in (tmp_path / "model/README.md").read_text()
    chart = merge_chart(History(records))
    assert "0.5 of step 2 at" in chart
    assert chart.count("stroke-dasharray: 4") >= 3 or chart.count("stroke-dasharray") >= 3


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "stage0", "stage1", "stage2", "stage3"])
def test_on_two_ranks(strategy, base_arguments, command, exact_model, tmp_path):
    model = [f"model_name={exact_model('llama-tied')}", "merge.curve=[0,0.5,1]", "merge.choose=forgetting<=100"]
    alone, ranks = tmp_path / "alone", tmp_path / "ranks"
    assert command([*words_of(base_arguments), *model, f"output_dir={alone}"])[0] == 0
    stage = strategy.removeprefix("stage")
    named = [f"strategy={strategy}"] if stage == strategy else ["strategy=deepspeed", f"strategy.zero_stage={stage}"]
    several = [*named, "devices=2", "batch_size=1"]
    code, _, err = command([*words_of(base_arguments), *model, *several, f"output_dir={ranks}"])
    assert code == 0, err
    for key, record in merges(alone).items():
        assert merges(ranks)[key]["loss"] == pytest.approx(record["loss"], rel=1e-5)
    ours, theirs = (load_file(folder / "model/model.safetensors") for folder in (ranks, alone))
    assert read_run_file(ranks)["merge_alpha"] == read_run_file(alone)["merge_alpha"]
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=5e-5)
