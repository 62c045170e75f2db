"""Whole runs on a mixture with replay, two phases and loss weights: the shares, the order and the losses under every strategy,
and a killed run that is resumed, bit for bit. Also runs on every kind of source and packing."""

import json
import os
import shutil

import pytest
import torch

from pretrain.data.fim import KNOWN_TOKENS
from pretrain.telemetry.run_file import read_run_file
from pretrain.telemetry.sinks.jsonl import read_records
from tests.runs import assert_same_run, kill_and_resume, losses, wait_for


@pytest.fixture
def arguments(base_arguments, exact_model, corpus, other_corpus, tmp_path):
    """Ten steps of 3 : 1, then ten of the code alone; a tenth is old text, and the code counts a quarter in the loss."""
    words = [w for w in base_arguments if not w.startswith(("dataset=", "dataset.nameOrPath", "model_name="))]
    words += [f"model_name={exact_model('llama')}", "dataset=mixture", "replay.share=0.1"]
    words += ["dataset@dataset.parts.es=local", f"dataset.parts.es.nameOrPath={corpus}", "dataset.weights.es=0.75"]
    code = tmp_path / "code"
    if not code.exists():
        code.mkdir()
        for i in range(30):
            (code / f"{i}.txt").write_text(f"def function_{i}(x):\n    return x + {i}\n" * (5 + i % 7))
    words += ["dataset@dataset.parts.code=local", f"dataset.parts.code.nameOrPath={code}", "dataset.weights.code=0.25"]
    return [*words, "phases=[{from: 0.5, weights: {code: 1}}]", "dataset.loss_weights.code=0.25"]


def parts(run):
    """What the last record says of each part."""
    return [r for r in read_records(run / "metrics.jsonl") if r["event"] == "data"][-1]["parts"]


def assert_shares(run):
    """20 steps of 4 sequences: 40 samples of 67.5, 22.5 and 10 %, then 40 of 90 and 10 %."""
    found = parts(run)
    wanted = {"es": 0.3375, "code": 0.5625, "replay": 0.1}
    assert {name: part["wanted"] for name, part in found.items()} == pytest.approx(wanted)
    for name, part in found.items():
        assert abs(part["tokens"] / 32 - 80 * wanted[name]) <= 2, "within one sample in each phase"
    assert sum(part["tokens"] for part in found.values()) == 80 * 32
    assert [phase["step"] for phase in read_run_file(run)["mixture"]] == [0, 10]


def crashed(run, copy, *, at):
    """A copy of a finished run as a kill behind the checkpoint ``at`` leaves it."""
    shutil.copytree(run, copy)
    (copy / "run.json").unlink()
    shutil.rmtree(copy / "model")
    for checkpoint in (copy / "checkpoints").glob("step-*"):
        if int(checkpoint.name.removeprefix("step-")) > at:
            shutil.rmtree(checkpoint)
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= at + 2))
    return copy


def test_one_process(arguments, command, tmp_path):
    """The shares, the table before the start, a crash in the first phase and one in the second, and another mixture."""
    run = tmp_path / "run"
    arguments = [*arguments, "checkpoint.keep_last=null"]
    code, out, err = command([*arguments, f"output_dir={run}"])
    assert code == 0, err
    assert_shares(run)
    log = (run / "logs/rank-0.log").read_text()
    for shown in (err, log):
        assert "from step 10" in shown
        assert "67.5%" in shown
    assert "by the weights" in out
    domains = {r["domain"]: r["role"] for r in read_records(run / "metrics.jsonl") if r["event"] == "evaluation"}
    assert domains == {"es": "new", "code": "new", "other": "base"}
    assert "| replay | 256 | 10.0% | 10.0% |" in (run / "model/README.md").read_text()
    for at in (5, 15):
        again = crashed(run, tmp_path / f"again-{at}", at=at)
        code, _, err = command([*arguments, f"output_dir={again}"])
        assert code == 0, err
        assert_same_run(again, run)
    words = sorted(arguments, key=lambda word: ".code" not in word)
    code, _, err = command([*words, f"output_dir={run}"])
    assert (code, "is finished: 20 steps" in err) == (0, True), "the order of the words does not matter"
    code, _, err = command([*arguments, f"output_dir={run}", "max_steps=30", "dataset.weights.es=0.5"])
    assert code == 2
    assert "dataset.weights.es: 0.75 → 0.5" in err
    assert "the mixture was [code 22.5%, es 67.5%, replay 10.0%; from step 10: code 90.0%, replay 10.0%]" in err
    assert "and is now [code 30.0%, es 60.0%, replay 10.0%; from step 15: code 90.0%, replay 10.0%]" in err
    assert "resume_allow=[data]" in err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "dataset.parts.code.nameOrPath=nowhere: no such file"),
        (
            ["dataset.max_epochs.es=0.01", "dataset.parts.code.nameOrPath={corpus}"],
            "max_epochs=0.01 of part 'es': the run would read it 0.0322 times",
        ),
        (
            ["sequence_length=128", "dataset.parts.code.nameOrPath={corpus}/x.txt"],
            "part 'code' has too little text",
        ),
    ],
)
def test_mistakes_in_the_text_name_the_part(words, says, arguments, command, corpus, tmp_path):
    (tmp_path / "x.txt").write_text("a few words")
    words = [word.replace("{corpus}/x.txt", f"{tmp_path}/x.txt").replace("{corpus}", str(corpus)) for word in words]
    code, _, err = command(
        [*arguments, "dataset.parts.code.nameOrPath=nowhere", *words, f"output_dir={tmp_path / 'run'}"]
    )
    assert code == 2, err
    assert err.count("error: ") == 1
    assert says in err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_equal_one_also_when_they_are_killed(strategy, arguments, command, spawn, tmp_path):
    code, _, err = command([*arguments, f"output_dir={tmp_path / 'one'}"])
    assert code == 0, err
    pair = [*arguments, f"strategy={strategy}", "devices=2", "batch_size=1"]
    code, _, err = command([*pair, f"output_dir={tmp_path / 'whole'}"])
    assert code == 0, err
    assert_shares(tmp_path / "whole")
    assert parts(tmp_path / "whole") == parts(tmp_path / "one")
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "one"), abs=2e-5)
    run = tmp_path / "run"
    kill_and_resume(pair, run, command, spawn, at=12)
    assert_same_run(run, tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["deepspeed", "dp"])
def test_other_strategies_weigh_the_loss_alike(strategy, arguments, command, tmp_path):
    code, _, err = command([*arguments, f"output_dir={tmp_path / 'one'}"])
    assert code == 0, err
    pair = [] if strategy == "dp" else ["devices=2", "batch_size=1"]
    code, _, err = command([*arguments, f"strategy={strategy}", *pair, f"output_dir={tmp_path / 'other'}"])
    assert code == 0, err
    assert losses(tmp_path / "other") == pytest.approx(losses(tmp_path / "one"), abs=2e-5)
    unweighted = [word for word in arguments if "loss_weights" not in word]
    code, _, err = command([*unweighted, f"output_dir={tmp_path / 'plain'}"])
    assert code == 0, err
    assert losses(tmp_path / "plain") != pytest.approx(losses(tmp_path / "one"), abs=1e-3)


@pytest.fixture
def packed_arguments(base_arguments, exact_model, corpus, tmp_path, monkeypatch):
    """Four kinds of parts: best-fit packing, fill in the middle, token ids read in place, files of a streamed dataset."""
    monkeypatch.setenv(
        "PRETRAIN_CACHE", str(tmp_path / "cache")
    )  # in place are those of this test, not of another's equal file
    import numpy as np
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from tests.conftest import SHAPES
    from tests.data.token_writers import nanogpt

    model = tmp_path / "fim-model"
    if not model.exists():
        torch.manual_seed(0)
        config = AutoConfig.for_model(**SHAPES["llama"], vocab_size=304, bos_token_id=0, eos_token_id=0)
        AutoModelForCausalLM.from_config(config).save_pretrained(model)
        tokenizer = AutoTokenizer.from_pretrained(exact_model("llama"))
        tokenizer.add_special_tokens({"additional_special_tokens": list(KNOWN_TOKENS[0])})
        tokenizer.save_pretrained(model)
        (tmp_path / "code").mkdir()
        for i in range(30):
            (tmp_path / f"code/{i}.py").write_text(f"def function_{i}(x):\n    return x + {i}\n" * (1 + i % 4))
        draw = np.random.default_rng(0)
        nanogpt(tmp_path / "ids", [[*draw.integers(2, 290, draw.integers(5, 60)), 0] for _ in range(90)], "uint16")
        (tmp_path / "hub").mkdir()
        lines = (json.dumps({"text": f"A line about {i} and {i * i}."}) for i in range(200))
        (tmp_path / "hub/train.jsonl").write_text("\n".join(lines))
    parts = {
        "text": ("local", corpus, ["packing=best_fit"]),
        "code": ("local", tmp_path / "code", ["pattern=*.py", "fim_rate=0.5"]),
        "ids": ("local", tmp_path / "ids/a.bin", ["format=tokens"]),
        "hub": ("huggingface", tmp_path / "hub", ["streaming=true", "packing=best_fit"]),
    }
    words = [w for w in base_arguments if not w.startswith(("dataset=", "dataset.nameOrPath", "model_name="))]
    words += [f"model_name={model}", "dataset=mixture", "dataset.document_mask=true"]
    for name, (kind, path, settings) in parts.items():
        words += [f"dataset@dataset.parts.{name}={kind}", f"dataset.parts.{name}.nameOrPath={path}"]
        words += [f"dataset.parts.{name}.{setting}" for setting in settings] + [f"dataset.weights.{name}=0.25"]
    return words


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp"])
def test_every_kind_of_part_and_packing_is_resumed_exactly(strategy, packed_arguments, command, spawn, tmp_path):
    """The losses of two processes are those of one, and a killed run is resumed bit for bit."""
    code, _, err = command([*packed_arguments, f"output_dir={tmp_path / 'one'}"])
    assert code == 0, err
    assert "of their positions are padding" in err
    assert len(parts(tmp_path / "one")) == 4
    pair = [] if strategy == "single" else [f"strategy={strategy}", "devices=2", "batch_size=1"]
    whole = tmp_path / "one"
    if pair:
        whole = tmp_path / "whole"
        code, _, err = command([*packed_arguments, *pair, f"output_dir={whole}"])
        assert code == 0, err
        assert parts(whole) == parts(tmp_path / "one")
        assert losses(whole) == pytest.approx(losses(tmp_path / "one"), abs=2e-5)
    kill_and_resume([*packed_arguments, *pair], tmp_path / "run", command, spawn, at=12)
    assert_same_run(tmp_path / "run", whole)
    for changed in ("packing=stream", "fim_rate=0.25"):
        name = "text" if changed.startswith("packing") else "code"
        code, _, err = command(
            [*packed_arguments, *pair, f"dataset.parts.{name}.{changed}", f"output_dir={whole}", "max_steps=30"]
        )
        assert code == 2
        assert f"dataset.parts.{name}.{changed.partition('=')[0]}: " in err


@pytest.mark.slow
@pytest.mark.parametrize("pair", [[], ["strategy=ddp", "devices=2", "batch_size=1"]], ids=["single", "ddp"])
def test_token_ids_that_are_cut_off_during_a_run(pair, packed_arguments, command, spawn, tmp_path):
    """One line; with the file restored, the same command resumes and ends as a run that was not disturbed."""
    ids, whole, run = tmp_path / "ids/a.bin", tmp_path / "whole", tmp_path / "run"
    code, _, err = command([*packed_arguments, *pair, f"output_dir={whole}"])
    assert code == 0, err
    content, times = ids.read_bytes(), ids.stat()
    process = spawn([*packed_arguments, *pair, f"output_dir={run}"])
    wait_for(run, 7, process)
    os.truncate(ids, 10)
    err = process.communicate(timeout=300)[0]
    assert process.returncode == 2, err
    assert err.count("error: ") == 1
    assert f"error: {ids}: changed or cut off during the run, which reads its tokens in place" in err
    ids.write_bytes(content)
    os.utime(ids, ns=(times.st_atime_ns, times.st_mtime_ns))
    code, _, err = command([*packed_arguments, *pair, f"output_dir={run}"])
    assert code == 0, err
    assert_same_run(run, whole)
