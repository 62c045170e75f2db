"""What may differ between a start and its resume continues; what may not is an error that lists old and new values."""

import json
import re
import shutil

import pytest
from omegaconf import OmegaConf

from pretrain.config.compose import run_config
from pretrain.config.schema import RunConfig
from pretrain.models.bpe import train_bpe
from pretrain.run.fingerprint import check_finished_run, check_same_run, differences
from pretrain.run.leftovers import read_config
from pretrain.runtime.errors import UserError
from pretrain.telemetry.run_file import read_run_file
from pretrain.telemetry.sinks.jsonl import read_records
from tests.conftest import sentences
from tests.runs import assert_same_run, numbers


def test_a_finished_run_is_left_alone_and_can_be_extended(uninterrupted, base_arguments, command, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    before = (run / "metrics.jsonl").read_bytes()
    code, _, err = command([*base_arguments, f"output_dir={run}"])
    assert code == 0
    assert "is finished: 20 steps" in err
    assert (run / "metrics.jsonl").read_bytes() == before
    code, _, err = command([*base_arguments, f"output_dir={run}", "lr=0.5"])
    assert code == 2
    assert "lr: 0.001 → 0.5" in err
    code, _, err = command([*base_arguments, f"output_dir={run}", "max_steps=25"])
    assert code == 0, err
    assert "the learning rate jumps from 0.0001 to 0.000166 at step 21: the schedule was made for 20 steps" in err
    assert f"model_name={run.resolve()}" in err
    steps = [r["step"] for r in read_records(run / "metrics.jsonl") if r["event"] == "train"]
    assert steps == list(range(1, 26))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["max_steps=8"], "max_steps=8: "),
        (["max_steps=null", "number_epochs=0.02"], "number_epochs=0.02 ("),
        (["max_steps=8", "resume={run}/checkpoints/step-00000015"], "step-00000015 is at step 15 already"),
    ],
)
def test_a_last_step_that_is_behind_is_refused(words, says, uninterrupted, base_arguments, command, tmp_path):
    """It said `finished at step 20/8`."""
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    code, _, err = command([*base_arguments, f"output_dir={run}", *(word.format(run=run) for word in words)])
    assert code == 2
    assert says in err
    assert err.count("\n") == 1
    assert "already. Choose at least" in err
    assert_same_run(run, uninterrupted)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("sequence_length=64", "sequence_length: 32 → 64"),
        ("batch_size=4", "batch_size: 2 → 4"),
        ("seed=1", "seed: 0 → 1"),
        ("dataset.held_out=0.2", "dataset.held_out: 0.05 → 0.2"),
        ("dataset.nameOrPath={other}", "dataset.nameOrPath: "),
        ("model_name={model}", "model_name: "),  # of other weights
    ],
)
def test_another_run_is_not_continued(
    change, says, uninterrupted, base_arguments, command, tmp_path, other_corpus, tiny_model
):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    model = tmp_path / "copy"
    shutil.copytree(tiny_model, model)
    (model / "config.json").write_text((model / "config.json").read_text() + "\n")
    change = change.format(other=other_corpus, model=model)
    code, _, err = command([*base_arguments, f"output_dir={run}", change, "max_steps=40"])
    assert code == 2
    assert says in err
    assert "→" in err
    assert_same_run(run, uninterrupted)


def test_the_split_of_an_equal_global_batch_may_change(uninterrupted, base_arguments, command, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    split = ["batch_size=4", "gradient_accumulation_steps=1", "max_steps=22"]
    code, _, err = command([*base_arguments, f"output_dir={run}", *split])
    assert code == 0, err
    assert read_run_file(run)["steps"] == 22


def test_a_refused_resume_changes_nothing(uninterrupted, base_arguments, command, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    before = sorted(p.name for p in (run / "checkpoints").iterdir())
    arguments = [*base_arguments, f"output_dir={run}", f"resume={run}/checkpoints/step-00000015"]
    code, _, err = command([*arguments, "sequence_length=64"])
    assert code == 2, err
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("precision=bf16-true", "precision.weights: float32 → bfloat16"),
        ("dataset.document_mask=true", "document_mask: "),
    ],
)
def test_what_would_change_the_numbers_is_refused(change, says, uninterrupted, base_arguments, command, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    code, _, err = command([*base_arguments, f"output_dir={run}", "max_steps=40", change])
    assert code == 2
    assert says in err
    assert_same_run(run, uninterrupted)


def test_more_epochs_and_other_sinks(base_arguments, command, tmp_path):
    """A run whose learning rate does not depend on its end continues as if it had been told so at first."""
    same = [*base_arguments, "max_steps=null", "scheduler=constant", "warmup_proportion=0", "checkpoint.export=never"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    for more in (
        ["number_epochs=0.1", "sink=jsonl", f"output_dir={whole}"],
        ["number_epochs=0.05", "sink=jsonl", f"output_dir={run}"],
        ["number_epochs=0.1", "sink=[jsonl,csv]", f"output_dir={run}"],
    ):
        code, _, err = command([*same, *more])
        assert code == 0, err
    trained, expected = ([r for r in numbers(f) if r["event"] == "train"] for f in (run, whole))
    assert trained == expected
    first = int((run / "train.csv").read_text().splitlines()[1].split(",")[0])
    assert 1 < first < len(trained)


@pytest.mark.parametrize(
    ("part", "change", "steps"),
    [
        ("data", ["dataset.train_data_ratio=0.5"], 24),
        ("seed", ["seed=1"], 24),
        ("sequence_length", ["sequence_length=16"], 24),
        ("global_batch", ["batch_size=4"], 24),
        ("weights", ["precision=bf16-true"], 24),
        ("optimizer", ["optimizer.compensate=false"], 24),
        ("tokenizer", ["model.tokenizer_name={tokenizer}"], 24),
    ],
)
def test_what_is_allowed_to_differ(part, change, steps, uninterrupted, base_arguments, command, tmp_path):
    """Refused, with the word that allows it; with it the run continues where it was."""
    run, tokenizer = tmp_path / "run", tmp_path / "tokenizer"
    shutil.copytree(uninterrupted, run)
    if part == "tokenizer":
        train_bpe(iter(sentences(i, 200) for i in range(5)), vocab_size=299).save_pretrained(tokenizer)
    change = [c.format(tokenizer=tokenizer) for c in change]
    arguments = [*base_arguments, f"output_dir={run}", f"max_steps={steps}", *change]
    code, _, err = command(arguments)
    assert code == 2
    allow = err.strip().splitlines()[-1].rsplit(" ", 1)[1]
    assert part in allow.removeprefix("resume_allow=[").removesuffix("]").split(",")
    code, _, err = command([*arguments, allow])
    assert code == 0, err
    records = [r for r in read_records(run / "metrics.jsonl") if r["event"] == "train"]
    assert [r["step"] for r in records] == list(range(1, steps + 1))
    assert records[20]["loss"] < records[0]["loss"] - 0.01, "it has not started over"
    before = json.loads((uninterrupted / "checkpoints/step-00000020/state.json").read_text())["progress"]
    after = json.loads((run / f"checkpoints/step-{steps:08d}/state.json").read_text())["progress"]
    assert after["tokens"] > before["tokens"]
    per_sequence = 2 if part == "sequence_length" else 1
    per_step = 8 if part == "global_batch" else 4
    assert after["samples"] == before["samples"] * per_sequence + 4 * per_step


def edited(config, **changes):
    """Root keys of a config.yaml replaced; ``None``: removed, ``group__key`` one of a group."""
    text = OmegaConf.load(config)
    for name, value in changes.items():
        node, key = (text[name.split("__")[0]], name.split("__")[1]) if "__" in name else (text, name)
        if value is None:
            del node[key]
        else:
            node[key] = value
    OmegaConf.save(text, config)


def test_lr_auto_is_the_number_of_the_size_then_that_of_the_run(base_arguments, command, tmp_path):
    short = [*base_arguments, "max_steps=3", "evaluate_every=null", "sink=jsonl", "checkpoint.export=never"]
    auto = [a for a in short if not a.startswith("lr=")]
    code, _, err = command([*auto, f"output_dir={tmp_path / 'run'}"])
    assert code == 0, err
    assert err.count("lr=auto: 0.001 (by the model's size") == 1
    config = OmegaConf.load(tmp_path / "run/config.yaml")
    assert config.lr == config.optimizer.lr == 0.001
    run = tmp_path / "other"
    assert command([*short, "lr=0.002", f"output_dir={run}"])[0] == 0
    code, _, err = command([*auto, f"output_dir={run}"])
    assert (code, "is finished" in err, "lr=auto" in err) == (0, True, False), err
    code, _, err = command([*auto, f"output_dir={run}", "max_steps=4"])
    assert code == 0, err
    assert "lr=auto: 0.002 (as in this run so far)" in err
    assert OmegaConf.load(run / "config.yaml").lr == 0.002


def test_a_run_from_before_there_were_keys_for_documents_borders(uninterrupted, tmp_path):
    checkpoint = tmp_path / "step-00000020"
    shutil.copytree(uninterrupted / "checkpoints/step-00000020", checkpoint)
    now = read_config(checkpoint)
    edited(checkpoint / "config.yaml", dataset__bos=None, dataset__separator=None)
    assert differences(read_config(checkpoint), now) == ["dataset.bos: None → auto", "dataset.separator: None → auto"]
    identity = json.loads((checkpoint / "state.json").read_text())["identity"]
    config = RunConfig.of(now)
    check_finished_run(read_config(checkpoint), config)
    check_same_run(checkpoint, identity, config, model_config={}, files="")
    with pytest.raises(UserError, match=r"dataset\.bos=false continues it"):
        check_same_run(checkpoint, identity | {"data": "with BOS"}, config, model_config={}, files="")


def test_keys_that_an_earlier_version_did_not_have_are_no_difference():
    """As long as they have their default value: root keys, groups, keys of parts, also of nested ones."""
    config = run_config([])
    old = json.loads(json.dumps(config.plain))
    for group in ("replay", "phases"):
        del old[group]
    for node in (old["dataset"], old["evaluation"]["domains"]["base"]):
        del node["role"]
    del old["evaluation"]["tasks"]
    check_finished_run(old, config)
    changed = {"replay.share=0.1": "replay: None", "dataset.role=base": "dataset.role: None → base"}
    for word, says in changed.items():
        with pytest.raises(UserError, match=re.escape(says)):
            check_finished_run(old, run_config([word]))
    del old["dataset"]["source"]  # of a class that has no default for it, or another class
    with pytest.raises(UserError, match=r"dataset\.name: python"):
        check_finished_run(old, run_config(["dataset=sample_base"]))


def test_the_attention_of_earlier_versions_is_no_difference():
    """Their default was sdpa, which `auto` is on a CPU."""
    config = run_config([])
    assert config.model.attention == "auto"
    old = json.loads(json.dumps(config.plain))
    old["model"]["attention"] = "sdpa"
    check_finished_run(old, config)
    old["model"]["attention"] = "eager"
    with pytest.raises(UserError, match=r"model\.attention: eager → "):
        check_finished_run(old, config)


def test_a_finished_run_split_otherwise_is_finished(uninterrupted, base_arguments, command, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    split = ["batch_size=1", "gradient_accumulation_steps=4"]
    code, _, err = command([*base_arguments, f"output_dir={run}", *split])
    assert code == 0, err
    assert "is finished: 20 steps" in err
