"""A whole run, looked at: what its records hold, how they hang together, and that nothing is read from the device between
log steps."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import pretrain
from pretrain.telemetry.run_file import read_run_file
from pretrain.telemetry.sinks.jsonl import read_records

PACKAGE = Path(pretrain.__file__).parent
STEPS, LOG_EVERY, LAYERS_EVERY, SAMPLES, LENGTH, PEAK = 12, 5, 4, 4, 32, 1e12
READS = ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__", "__index__", "__array__")
BESIDE = {"evaluate", "capture_base", "save", "resume", "finish"}  # what pauses training
# Reads in every step that are no number's: on a GPU `update` decides on the device, `_read` looks at what was copied to the
# host a step before; and in each forward transformers looks whether rows are packed.
FREE = {("strategy/engine.py", "update"), ("training/guard/guard.py", "_read"), ("models/language_model.py", "_hidden")}


def reader() -> tuple[str, str] | None:
    """Which function of ours reads a tensor inside of a training step."""
    frame, found = sys._getframe(2), None
    while frame is not None:
        code = frame.f_code
        if Path(code.co_filename).is_relative_to(PACKAGE):
            found = found or (str(Path(code.co_filename).relative_to(PACKAGE)), code.co_name)
            if code.co_filename.endswith("pretrain/training/trainer.py") and code.co_name in (*BESIDE, "run"):
                return found if code.co_name == "run" else None
        frame = frame.f_back
    return None


@pytest.fixture(scope="module")
def watched(tmp_path_factory, tiny_model, corpus):
    """The run folder, and how often each function has read a tensor in a step."""
    from pretrain.cli.main import main

    run, reads = tmp_path_factory.mktemp("monitored") / "run", Counter()
    arguments = [f"model_name={tiny_model}", "dataset=local", f"dataset.nameOrPath={corpus}", f"output_dir={run}"]
    arguments += ["evaluation=new_only", f"sequence_length={LENGTH}", "batch_size=2", "gradient_accumulation_steps=2"]
    arguments += [f"max_steps={STEPS}", f"log_every={LOG_EVERY}", "evaluate_every=8", "save_every=6", "sink=[jsonl]"]
    arguments += [f"telemetry.peak_flops={PEAK}", f"telemetry.layers_every={LAYERS_EVERY}"]

    def counting(method):
        def read(self, *args, **kwargs):
            site = reader()
            if site is not None:
                reads[site] += 1
            return method(self, *args, **kwargs)

        return read

    with pytest.MonkeyPatch.context() as patch:
        for name in READS:
            patch.setattr(torch.Tensor, name, counting(getattr(torch.Tensor, name)))
        with pytest.raises(SystemExit) as left:
            main(arguments)
    assert left.value.code == 0
    return run, reads


def records(run, event):
    return [r for r in read_records(run / "metrics.jsonl") if r["event"] == event]


def test_the_device_is_read_at_log_steps_only(watched):
    run, reads = watched
    logged = len(records(run, "train"))
    assert [r["step"] for r in records(run, "train")] == [1, 5, 10, 12]
    assert {site: count for site, count in reads.items() if site not in FREE} == {
        ("telemetry/window.py", "numbers"): logged,
        ("telemetry/monitor.py", "_write_layers"): STEPS // LAYERS_EVERY - 1,  # those of step 8 with its evaluation
    }


def test_a_train_record_holds_what_the_page_says(watched):
    run, _ = watched
    page = (PACKAGE.parent / "docs/monitoring.md").read_text()
    for record in records(run, "train"):
        assert [name for name in record if f"`{name}`" not in page] == []
        parts = sum(record[f"{p}_seconds"] for p in ("data", "communication", "compute", "optimizer"))
        assert 0 < parts <= record["step_seconds"]
        assert record["compute_seconds"] > 0
        assert record["optimizer_seconds"] > 0
        assert record["host_memory_gib"] > 0.05
        assert (record["memory_reserved_gib"], record["loss_scale"]) == (None, None)


def test_rates_follow_from_each_other(watched):
    run, _ = watched
    (started,), train = records(run, "run_started"), records(run, "train")
    for r in train:
        assert r["tokens_per_second"] == pytest.approx(SAMPLES * LENGTH / r["step_seconds"])
        assert r["samples_per_second"] == pytest.approx(SAMPLES / r["step_seconds"])
        assert r["model_flops_per_second"] == pytest.approx(r["tokens_per_second"] * started["flops_per_token"])
        assert r["mfu"] == pytest.approx(r["model_flops_per_second"] / PEAK)
        assert 0 < r["goodput"] < 1
    assert started["flops_per_token_full_attention"] > started["flops_per_token"] > 6 * 27_000
    assert [r["eta_seconds"] is None for r in train] == [True, False, False, False]
    assert train[1]["eta_seconds"] > 0
    assert train[-1]["eta_seconds"] == 0
    assert train[0]["evaluation_seconds"] > 0, "the model before the run"
    assert [r["checkpoint_seconds"] > 0 for r in train] == [False, False, True, False]


def test_the_end_says_it_of_the_whole_run(watched):
    run, _ = watched
    (finished,), facts, train = records(run, "run_finished"), read_run_file(run), records(run, "train")
    before = [0] + [r["step"] for r in train]
    seconds = sum((r["step"] - b) * r["step_seconds"] for r, b in zip(train, before, strict=False))
    assert finished["train_seconds"] == facts["train_seconds"] == pytest.approx(seconds)
    assert finished["tokens_per_second"] == train[-1]["tokens_per_second_run"] == facts["tokens_per_second"]
    assert finished["mfu"] == pytest.approx(finished["tokens_per_second"] * facts["flops_per_token"] / PEAK)
    assert 0 < facts["goodput"] < 1
    assert facts["started_at"] <= records(run, "run_started")[0]["time"] + 1


def test_data_is_told_at_evaluations(watched, corpus):
    run, _ = watched
    found = records(run, "data")
    assert [r["step"] for r in found] == [8, 12]
    for r in found:
        (source,) = r["sources"].values()  # more files than there is room for, in one folder
        assert source["tokens"] == r["step"] * SAMPLES * LENGTH
        assert source["share"] == 1.0
        assert r["tokens_per_document"] == pytest.approx(source["tokens"] / source["documents"])


def test_layers(watched):
    run, _ = watched
    found = records(run, "layers")
    assert [r["step"] for r in found] == [4, 8, 12]
    assert list(found[0]["layers"]) == ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm"]
    for norms in found[0]["layers"].values():
        assert norms["update_ratio"] == pytest.approx(norms["update_norm"] / norms["weight_norm"])
    at_the_end = {r["step"]: r for r in records(run, "train")}[12]
    total = sum(norms["grad_norm"] ** 2 for norms in found[-1]["layers"].values()) ** 0.5
    assert total == pytest.approx(at_the_end["grad_norm"], rel=1e-4), "before clipping"
