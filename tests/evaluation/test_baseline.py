"""A baseline knows what it was measured on: a resumed run that scores something else never compares the two."""

import csv
import json
import shutil
from itertools import combinations

import pytest

from pretrain.data.evaluation import evaluation_batches
from pretrain.evaluation.baseline import Known, digest, known
from pretrain.sweep.measure import measures_of, objective_in
from pretrain.telemetry.sinks.jsonl import read_records
from tests.conftest import sentences
from tests.training.test_trainer import view_of

MEASURED = {"text": "1f", "sequence_length": 32, "document_mask": False, "tokenizer": "ab", "precision": "32-true"}


@pytest.mark.parametrize(
    ("now", "found"),
    [
        ({}, Known(2.0)),
        ({"text": "2f"}, Known(reason="step 0 was scored with other text")),
        ({"sequence_length": 64, "text": "2f"}, Known(reason="step 0 was scored with sequence_length=32, not 64")),
        ({"document_mask": True}, Known(reason="step 0 was scored with document_mask=false, not true")),
        ({"tokenizer": "cd", "text": "2f"}, Known(reason="step 0 was scored with another tokenizer")),
        ({"precision": "bf16-mixed"}, Known(reason="step 0 was scored with precision=32-true, not bf16-mixed")),
    ],
)
def test_a_loss_is_the_baseline_of_the_same_measurement_only(now, found):
    assert known("old", MEASURED | now, {"old": 2.0}, {"old": MEASURED}) == found
    assert (digest(MEASURED | now) == digest(MEASURED)) == (not now)


def test_a_domain_may_get_another_name_and_an_old_checkpoint_knows_only_names():
    assert known("older", MEASURED, {"old": 2.0}, {"old": MEASURED}) == Known(2.0)
    assert known("old", MEASURED, {"old": 2.0}, {}) == Known(2.0)
    assert known("older", MEASURED, {"old": 2.0}, {}) == Known(reason="not scored at step 0")


def test_the_digest_is_of_what_the_model_reads(base_arguments):
    view = view_of(base_arguments)

    def of(length=32, size=4, mask=False, most=600):
        return evaluation_batches(view, length, size, mask, most).digest()

    assert of(size=1) == of(size=4) == of(size=7)
    different = [of(), of(length=16), of(mask=True), of(most=2000), of(most=None)]
    assert all(a != b for a, b in combinations(different, 2))


STILL = ["lr=1e-12", "evaluate_every=4", "save_every=4", "evaluation.max_tokens=4000", "dataset.held_out=0.2"]
STILL += ["evaluation.domains.base.held_out=0.5"]


@pytest.fixture
def halfway(reference, base_arguments, command):
    """A run of 4 steps that leaves the weights as they are, so that no loss changes; to be copied."""
    if not reference.exists():
        still = [*STILL, "sink=[jsonl]"]
        code, _, err = command([*base_arguments, *still, "max_steps=4", f"output_dir={reference}"])
        assert code == 0, err
    return reference


@pytest.fixture
def resumed(halfway, base_arguments, command, tmp_path):
    """``resumed(*changes) -> (run, stdout, stderr)``: two more steps of a copy of that run."""

    def run(*changes, name="run"):
        shutil.copytree(halfway, tmp_path / name)
        still = [*STILL, "sink=[console,jsonl]", "max_steps=6"]
        code, out, err = command([*base_arguments, *still, f"output_dir={tmp_path / name}", *changes])
        assert code == 0, err
        return tmp_path / name, out, err

    return run


def last_scores(run):
    """The scores of step 6 by domain."""
    records = read_records(run / "metrics.jsonl")
    return {r["domain"]: r for r in records if r["event"] == "evaluation" and r["step"] == 6}


def trained(run):
    return [(r["step"], r["loss"]) for r in read_records(run / "metrics.jsonl") if r["event"] == "train"]


CHANGES = {
    "less text": (["evaluation.max_tokens=700"], None, "other text"),
    "other text": (["evaluation.domains.base.nameOrPath={other}"], {"other"}, "other text"),
    "a shorter context": (["sequence_length=16", "resume_allow=[sequence_length]"], None, "sequence_length=32, not 16"),
    "a document mask": (["dataset.document_mask=true", "resume_allow=[data]"], None, "document_mask=false, not true"),
    "another tokenizer": (
        ["model.tokenizer_name={tokenizer}", "resume_allow=[tokenizer,data]"],
        None,
        "another tokenizer",
    ),
    "16 bits": (["precision=bf16-mixed"], None, "precision=32-true, not bf16-mixed"),
    "a further domain": (
        ["+dataset@evaluation.domains.more=local", "evaluation.domains.more.nameOrPath={other}"],
        {"more"},
        "not scored at step 0",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_resumed_run_scores_is_compared_with_the_untouched_model_on_the_same(change, resumed, tmp_path):
    """Nothing was learned, so nothing may seem to be: it was 0.2 nats by other text alone."""
    from pretrain.models.bpe import train_bpe

    words, domains, reason = CHANGES[change]
    other = tmp_path / "more"
    other.mkdir()
    for i in range(30):
        (other / f"{i}.txt").write_text(sentences(5000 + i, 40).title())
    train_bpe(iter(sentences(99 + i, 200)[::-1] for i in range(5)), vocab_size=280).save_pretrained(
        tmp_path / "tokenizer"
    )
    run, out, err = resumed(*(word.format(other=other, tokenizer=tmp_path / "tokenizer") for word in words))
    scores = last_scores(run)
    assert {name: s["delta_loss"] for name, s in scores.items()} == pytest.approx(dict.fromkeys(scores, 0.0), abs=1e-5)
    assert all(s["delta_reason"] is None for s in scores.values())
    said = next(line for line in err.splitlines() if line.startswith("the model before this run is scored again: "))
    assert {part.split(": ")[0] for part in said.partition("again: ")[2].split("; ")} == (domains or scores.keys())
    assert said.endswith(reason)
    assert "better" not in out
    assert "worse" not in out


def test_scoring_again_changes_no_step_and_nothing_is_scored_without_need(resumed):
    """The model has dropout: a random number drawn would show in every loss."""
    plain, _, err = resumed(name="plain")
    assert "scored again" not in err
    again, _, err = resumed("evaluation.max_tokens=700", name="again")
    assert "scored again" in err
    assert trained(again) == trained(plain)
    assert len(trained(plain)) == 6
    state = json.loads((again / "checkpoints/step-00000006/state.json").read_text())["progress"]
    assert state["measured_on"].keys() == state["baseline"].keys()
    assert state["measured_on"]["other"]["sequence_length"] == 32


def test_where_the_untouched_model_can_t_be_had_the_change_is_not_known(base_arguments, command, tmp_path):
    """Random weights of another seed are another model: null, with the reason, wherever a change is shown."""
    run = tmp_path / "run"
    scratch = [*base_arguments, *STILL, "lr=1e-3", "model=scratch", "sink=[console,jsonl,csv,report]"]
    code, _, err = command([*scratch, "max_steps=4", f"output_dir={run}"])
    assert code == 0, err
    changed = ["max_steps=6", "seed=3", "resume_allow=[seed]", "evaluation.max_tokens=700"]
    code, out, err = command([*scratch, *changed, f"output_dir={run}"])
    assert code == 0, err
    assert "scored again" not in err
    reason = "step 0 was scored with other text"
    scores = last_scores(run)
    assert [(s["delta_loss"], s["delta_reason"]) for s in scores.values()] == [(None, reason)] * 2
    assert f"other: change since step 0 unknown: {reason}" in out
    assert "better" not in out.split("step 6/6")[1]
    page = (run / "report.html").read_text()
    assert f"The change on other is not known: {reason}." in page
    assert "nats per token)" not in page.split('class="verdict">')[1].split("</p>")[0]
    card = (run / "model/README.md").read_text()
    assert (
        f"| other (base) | — → {scores['other']['loss']:.4f} | — | — → {scores['other']['perplexity']:,.2f} |" in card
    )
    assert "Changes that are not known: corpus" in card
    with (run / "evaluation.csv").open(newline="") as file:
        assert [(row["delta_loss"], row["delta_reason"]) for row in csv.DictReader(file)][-1] == ("", reason)
    measures = measures_of(run)
    assert [measures[name] for name in ("new_delta", "forgetting")] == [None, None]
    assert objective_in(measures, "other.delta_loss") is None
    assert objective_in(measures, "other.loss") == scores["other"]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy",
    [
        ["strategy=ddp"],
        ["strategy=fsdp"],
        ["strategy=fsdp", "strategy.cpu_offload=true"],
        ["strategy=deepspeed", "strategy.zero_stage=1"],
        ["strategy=deepspeed", "strategy.zero_stage=3"],
    ],
    ids="-".join,
)
def test_the_untouched_model_is_scored_again_under_every_strategy(
    strategy, base_arguments, exact_model, spawn, tmp_path
):
    """And the steps after it are those of a run that was resumed without."""
    if "deepspeed" in strategy[0]:
        pytest.importorskip("deepspeed")
    lr = "lr=1e-3"
    model = [*base_arguments, *STILL, f"model_name={exact_model('llama')}", lr]
    ranks = ["devices=2", "batch_size=1", *strategy]
    for name, steps, more in (
        ("plain", 4, []),
        ("again", 4, []),
        ("plain", 8, []),
        ("again", 8, ["evaluation.max_tokens=700"]),
    ):
        process = spawn([*model, *ranks, f"max_steps={steps}", f"output_dir={tmp_path / name}", "sink=[jsonl]", *more])
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0, out
        assert ("scored again" in out) == bool(more), out
    assert trained(tmp_path / "again") == trained(tmp_path / "plain")
    (base,) = (r for r in read_records(tmp_path / "again/metrics.jsonl") if r["step"] == 8 and r.get("domain") == "other"
               and r["event"] == "evaluation")  # fmt: skip
    process = spawn([*model, "task=evaluation", "evaluation.max_tokens=700", f"output_dir={tmp_path / 'untouched'}", "devices=1",
                     "strategy=single", "sink=[jsonl]"])  # fmt: skip
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    untouched = {
        r["domain"]: r["loss"] for r in read_records(tmp_path / "untouched/metrics.jsonl") if r["event"] == "evaluation"
    }
    assert base["loss"] - base["delta_loss"] == pytest.approx(untouched["other"], abs=1e-5)
