"""Evaluation domains are known by their key; names that two of them share are shown with the key in front."""

import csv
import json

import pytest

from pretrain.config.compose import run_config
from pretrain.data.domains import evaluation_domains
from pretrain.data.sources.local import Local
from pretrain.data.sources.sample import English
from pretrain.runtime.errors import UserError
from pretrain.sweep.plan import check_metric
from pretrain.telemetry.run_file import read_run_file
from pretrain.telemetry.sinks.jsonl import read_records
from tests.conftest import sentences


def local(path, **more):
    return Local(nameOrPath=path, **more)


def base_domains(dataset, bases):
    """Name → source of the domains that are not trained on."""
    return {d.name: d.source for d in evaluation_domains(dataset, bases) if d.part is None}


@pytest.mark.parametrize(
    ("new", "bases", "shown"),
    [
        ("n/new.txt", {"base": "b/old.txt"}, ["old"]),
        ("a/train.jsonl", {"base": "b/train.jsonl"}, ["base/train"]),
        ("n/new.txt", {"a": "a/train.txt", "b": "b/train.txt"}, ["a/train", "b/train"]),
        ("a/train.txt", {"b": "b/train.txt", "c": "c/train.csv"}, ["b/train", "c/train"]),
        ("x/b.txt", {"b": "a/b/train.txt", "c": "c/b/train"}, ["b/train", "c/train"]),
    ],
)
def test_no_two_domains_share_a_name(new, bases, shown):
    found = base_domains(local(new), {key: local(path) for key, path in bases.items()})
    assert list(found) == shown
    assert [source.nameOrPath for source in found.values()] == list(bases.values())


def test_a_name_that_a_key_makes_may_be_taken_too():
    """A key with a slash, so that the first try is a name of another domain."""
    bases = {"a": local("x.txt", name="train"), "b": local("y.txt", name="train"), "c": local("z.txt", name="a/train")}
    found = base_domains(local("n.txt"), bases)
    assert [source.nameOrPath for source in found.values()] == ["x.txt", "y.txt", "z.txt"]
    assert list(found) == ["a/a/train", "b/train", "c/a/train"]


def test_the_training_data_itself_is_scored_once():
    assert base_domains(English(), {"base": English()}) == {}
    assert list(base_domains(English(), {"base": English(held_out=0.5)})) == ["base/english"], "other documents"
    assert list(base_domains(local("english"), {"base": English()})) == ["base/english"]


def test_replayed_text_takes_no_domain_s_place():
    bases = {"replay": local("a.txt"), "replay+": local("b.txt")}
    found = evaluation_domains(local("n.txt"), bases, local("c.txt"))
    assert [(d.source.nameOrPath, d.role) for d in found] == [
        *[("n.txt", "new"), ("a.txt", "base"), ("b.txt", "base"), ("c.txt", "base")]
    ]
    assert len(evaluation_domains(local("n.txt"), bases, local("a.txt"))) == 3, "it is scored once"


@pytest.fixture(scope="module")
def trains(tmp_path_factory):
    """Three folders, each with another train.jsonl."""
    folder = tmp_path_factory.mktemp("trains")
    for i, name in enumerate(("a", "b", "c")):
        (folder / name).mkdir()
        texts = (sentences(1000 * i + n, 40) for n in range(40))
        texts = (text.upper() if name == "b" else text[::-1] if name == "c" else text for text in texts)
        (folder / name / "train.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return folder


def of(base_arguments, **sources):
    """The arguments with other text: the training data under ``new``, base domains by key."""
    kept = [a for a in base_arguments if "nameOrPath" not in a and "domains" not in a]
    for key, path in sources.items():
        if key == "new":
            kept.append(f"dataset.nameOrPath={path}")
        else:
            plus = "" if key == "base" else "+"
            kept += [f"{plus}dataset@evaluation.domains.{key}=local", f"evaluation.domains.{key}.nameOrPath={path}"]
    return kept


def test_the_base_domain_is_scored_and_shown_everywhere(trains, base_arguments, command, tmp_path):
    """Both files are called train.jsonl: forgetting was never measured, and nothing said so."""
    run = tmp_path / "run"
    arguments = of(base_arguments, new=trains / "a/train.jsonl", base=trains / "b/train.jsonl")
    arguments += [
        "checkpoint.keep_best=1",
        "checkpoint.best_by=base/train",
        "sink=[console,jsonl,csv,tensorboard,report]",
    ]
    code, out, err = command([*arguments, f"output_dir={run}", "max_steps=8"])
    assert code == 0, err
    assert "base/train (base)" in out
    records = [r for r in read_records(run / "metrics.jsonl") if r["event"] == "evaluation"]
    names = [("train", "new"), ("base/train", "base")]
    assert [(r["step"], r["domain"], r["role"]) for r in records] == [(s, *name) for s in (0, 8) for name in names]
    base = records[-1]
    assert base["delta_loss"] == base["loss"] - records[1]["loss"] != 0
    assert read_run_file(run)["results"]["base/train"]["loss"] == base["loss"]
    assert "base/train (base)" in (run / "report.html").read_text()
    assert (
        f"| base/train (base) | {records[1]['loss']:.4f} → {base['loss']:.4f} |"
        in (run / "model/README.md").read_text()
    )
    with (run / "evaluation.csv").open(newline="") as file:
        assert [row["domain"] for row in csv.DictReader(file)] == ["train", "base/train"] * 2
    events = b"".join(file.read_bytes() for file in (run / "tensorboard").iterdir())
    assert b"evaluation/base/train/delta_loss" in events
    samples = [r["domain"] for r in read_records(run / "metrics.jsonl") if r["event"] == "sample"]
    assert samples == ["train", "base/train"] * 2


def test_two_base_domains_of_one_name_have_a_baseline_each(trains, base_arguments, command, tmp_path):
    run = tmp_path / "run"
    sources = {"new": trains / "c", "base": trains / "a/train.jsonl", "other": trains / "b/train.jsonl"}
    code, out, err = command([*of(base_arguments, **sources), f"output_dir={run}", "max_steps=1"])
    assert code == 0, err
    records = [r for r in read_records(run / "metrics.jsonl") if r["event"] == "evaluation"]
    before, after = records[:3], records[3:]
    assert [r["domain"] for r in before] == ["c", "base/train", "other/train"]
    assert [r["delta_loss"] for r in before] == [0.0, 0.0, 0.0]
    assert [r["delta_loss"] for r in after] == [a["loss"] - b["loss"] for a, b in zip(after, before, strict=True)]
    assert "than at step 0" not in out.split("step 1/1")[0]
    announced = [line for line in err.splitlines() if line.startswith("evaluating ")]
    assert announced == [f"evaluating {r['domain']} ({r['role']}): {r['tokens']:,} tokens" for r in before], (
        "before the first evaluation, which may take minutes; no other one"
    )


def test_a_sweep_s_metric_may_be_of_such_a_domain(trains):
    words = ["dataset=local", f"dataset.nameOrPath={trains / 'a/train.jsonl'}", "evaluation=new_only"]
    words += ["+dataset@evaluation.domains.old=local", f"evaluation.domains.old.nameOrPath={trains / 'b/train.jsonl'}"]

    def checked(metric):
        check_metric(run_config([*words, f"sweep.metric={metric}"]))

    checked("old/train.delta_loss")
    checked("train.loss")
    with pytest.raises(UserError, match="no such domain is evaluated"):
        checked("old.loss")


def test_a_domain_of_a_single_document_has_nothing_to_score(trains, base_arguments, command, tmp_path):
    single = tmp_path / "single.txt"
    single.write_text(sentences(7, 300)[:6000])
    arguments = [*of(base_arguments, new=trains / "a", base=single), f"output_dir={tmp_path / 'run'}", "max_steps=1"]
    code, _, err = command(arguments)
    assert code == 2
    assert err.count("\n") == 1
    assert "none of the text of 'single' is held out, so it can't be scored: it is a single document" in err
    assert command([*arguments, "evaluation.domains.base.held_out=0"])[0] == 2
    arguments = [*of(base_arguments, new=single, base=trains / "a"), f"output_dir={tmp_path / 'other'}", "max_steps=1"]
    code, _, err = command(arguments)
    assert code == 0, err
    assert "dataset 'single' is a single document: none is held out, so it is not scored" in err
    code, _, err = command([*arguments, "checkpoint.keep_best=1", f"output_dir={tmp_path / 'third'}"])
    assert code == 2
    assert "checkpoint.keep_best=1: the new domain is not evaluated; name another with checkpoint.best_by" in err
