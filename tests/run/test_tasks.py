"""Evaluation, generation and tokenization share the run's configuration; the exported model is a Hugging Face folder."""

import json
import math

import pytest
import torch

from pretrain.telemetry.sinks.jsonl import read_records


@pytest.fixture
def trained(base_arguments, command, tmp_path):
    run = tmp_path / "run"
    code, out, err = command([*base_arguments, f"output_dir={run}", "evaluation.max_tokens=null"])
    assert code == 0, err
    return run, out


def test_the_run_folder_and_what_is_printed(trained):
    run, out = trained
    facts = json.loads((run / "run.json").read_text())
    assert facts["status"] == "finished"
    assert facts["steps"] == 20
    assert facts["strategy"] == "single"
    assert set(facts["results"]) == {"other"} | {n for n in facts["results"] if facts["results"][n]["role"] == "new"}
    evaluations = [r for r in read_records(run / "metrics.jsonl") if r["event"] == "evaluation"]
    assert {r["step"] for r in evaluations} == {0, 8, 16, 20}
    for record in evaluations:
        assert record["perplexity"] == pytest.approx(math.exp(record["loss"]))
        baseline = next(r for r in evaluations if r["domain"] == record["domain"])
        assert record["delta_loss"] == pytest.approx(record["loss"] - baseline["loss"])
    assert (run / "config.yaml").exists()
    assert (run / ".hydra" / "overrides.yaml").exists()
    for domain, last in facts["results"].items():
        assert f"{domain} ({last['role']})" in out
        assert f"{last['perplexity']:,.2f}" in out
    assert str(run / "model") in out


def test_evaluation_of_the_exported_model_gives_the_run_s_last_scores(trained, base_arguments, command, tmp_path):
    run, _ = trained
    again = tmp_path / "again"
    more = ["task=evaluation", f"model_name={run / 'model'}", f"output_dir={again}", "evaluation.max_tokens=null"]
    code, _, err = command([*base_arguments, *more])
    assert code == 0, err
    before, after = (json.loads((folder / "run.json").read_text())["results"] for folder in (run, again))
    assert before.keys() == after.keys()
    for domain in before:
        assert after[domain]["loss"] == pytest.approx(before[domain]["loss"], abs=1e-6)
        assert after[domain]["bits_per_byte"] == pytest.approx(before[domain]["bits_per_byte"], abs=1e-6)


def test_bits_per_byte_counts_the_bytes_of_the_held_out_documents(trained, other_corpus):
    """The `other` domain's held-out files, found again by their hash, weigh exactly what was divided by."""
    import xxhash

    run, _ = trained
    result = json.loads((run / "run.json").read_text())["results"]["other"]
    texts = [f.read_text() for f in other_corpus.iterdir()]
    held_out = [t for t in texts if xxhash.xxh3_64_intdigest(t.encode()) <= 0.05 * 2**64]
    held_out = held_out or [min(texts, key=lambda t: xxhash.xxh3_64_intdigest(t.encode()))]
    size = sum(len(t.encode()) for t in held_out)
    assert result["bits_per_byte"] == pytest.approx(result["loss"] * result["tokens"] / math.log(2) / size, rel=1e-6)


def test_the_model_folder_is_transformers_own(trained):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, _ = trained
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert not list((run / "model").glob("*.bin"))
    ids = tokenizer("the sea", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=5, do_sample=False).shape[1] == ids.shape[1] + 5
    assert model.dtype == torch.float32


def test_generation_is_seeded(tiny_model, command, tmp_path):
    def samples(*more):
        folder = tmp_path / "out"
        arguments = ["task=generation", f"model_name={tiny_model}", "sequence_length=64", f"output_dir={folder}"]
        code, out, err = command(
            [*arguments, "generation.prompts=[the sea, old]", "generation.max_new_tokens=12", *more]
        )
        assert code == 0, err
        assert "'the sea'" in out
        return [json.loads(line)["text"] for line in (folder / "samples.jsonl").read_text().splitlines()]

    assert samples("seed=1") == samples("seed=1")
    assert samples("seed=1") != samples("seed=2")
    assert samples("seed=1", "generation.temperature=0") == samples("seed=2", "generation.temperature=0")
    assert len(samples("generation.num_samples=3")) == 6


def test_tokenization_fills_the_cache_for_the_run(base_arguments, command, tmp_path, monkeypatch):
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "cache"))
    code, out, err = command([*base_arguments, "task=tokenization", "dataset.held_out=0.3"])
    assert code == 0, err
    assert "training: " in out
    assert str(tmp_path / "cache") in out
    parts = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache" / "parts").rglob("*") if p.is_file()}
    assert parts
    code, _, err = command([*base_arguments, f"output_dir={tmp_path / 'run'}", "max_steps=1"])
    assert code == 0, err
    assert parts == {p: p.stat().st_mtime_ns for p in (tmp_path / "cache" / "parts").rglob("*") if p.is_file()}
