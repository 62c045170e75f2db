"""The scripts that need a checkout."""

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.preloaded import run_preloaded

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


def script(name, *arguments, **options):
    return run_preloaded([SCRIPTS / name, *arguments], cwd=SCRIPTS.parent, **options)


@pytest.mark.slow
def test_bench_checkpoint(tmp_path):
    done = script("bench_checkpoint.py", "--rounds", "1", "--folder", tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^5\d\.\d M parameters, 1 rounds after the first", done.stdout, re.M)
    header, _, *rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("|")]
    assert header[0] == "blocked s"
    took = {name: [float(cell) for cell in cells] for name, *cells in rows}
    assert {"ours", "ours, sync", "torch.save", "DCP", "DCP async"} <= took.keys()
    assert all(len(cells) == 5 for cells in took.values())
    assert not list(tmp_path.iterdir()), "what it wrote is taken away"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_bench_gpu(tmp_path):
    """Rows run with a tiny model, here the eager ones: compiled ones take minutes on a CPU (`--tiny` runs them all)."""
    out = tmp_path / "bench.json"
    only = "1.18B (eager|activations|compiled on|no such)|titan 162M"
    done = script("bench_gpu.py", "--tiny", "--steps", "10", "--only", only, "--out", out, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {(row["who"], row["name"]): row for row in json.loads(out.read_text())["rows"]}
    assert rows["titan", "compiled"]["skipped"]
    measured = {key: row for key, row in rows.items() if "skipped" not in row}
    assert measured.keys() == {("ours", "eager"), ("bare", "eager"), ("ours", "activations on the host")}
    for row in measured.values():
        assert row["tokens_per_second"] > 0
        assert row["peak_gib"] > 0
        assert row["to_step"] > 0
        assert row["mfu"] is None, "a CPU has no known peak"
    assert done.stdout.count("| FAILED") == 0


def test_rows_of_bench_gpu():
    """What they count is what the program counts; what can't run or does not fit the budget says why."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from pretrain.models.flops import flops_per_token

    spec = importlib.util.spec_from_file_location("bench_gpu", SCRIPTS / "bench_gpu.py")
    bench = importlib.util.module_from_spec(spec)
    sys.modules["bench_gpu"] = bench  # dataclasses look it up there
    spec.loader.exec_module(bench)
    for size in bench.SIZES.values():
        shape = {
            "hidden_size": size.width,
            "intermediate_size": size.ffn,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.kv_heads,
        }
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(vocab_size=size.vocabulary, tie_word_embeddings=False, **shape))
        assert size.flops_per_token == flops_per_token(model, size.length).causal
    parameters = {name: round(s.flops_per_token / 6e6) for name, s in bench.SIZES.items()}
    assert all(abs(parameters[name] - expected) < 0.2 * expected for name, expected in (("1.18B", 1145), ("162M", 133)))
    names = [(row.who, row.size, row.name) for row in bench.ROWS]
    assert len(set(names)) == len(names)
    titan = next(row for row in bench.ROWS if row.who == "titan")
    assert bench.reason_to_skip(bench.Row("ours", "162M", "x", needs="no_such_package"), "cuda", 99) == (
        "no_such_package is not installed"
    )
    assert bench.reason_to_skip(bench.Row("ours", "162M", "x", only_gpu=True), "cpu", 99) == "needs a GPU"
    assert bench.reason_to_skip(bench.Row("ours", "162M", "x"), "cpu", 20) == "the budget is spent"
    assert titan.only_gpu
    for row in bench.ROWS:
        if row.who == "ours":
            assert not [word for word in row.words if "=" not in word]
    assert "| FAILED after 3 s |" in bench.shown(
        {"who": "a", "size": "b", "name": "c", "failed": "why", "seconds": 3.0}
    )


@pytest.mark.slow
def test_bench_train():
    done = script("bench_train.py", "--rounds", "1", "--steps", "4", "--only", "eager-bf16")
    assert done.returncode == 0, done.stderr
    speeds = dict(re.findall(r"^\| (ours|bare|trainer) \| ([\d,]+) \|", done.stdout, re.M))
    assert {"ours", "bare"} <= speeds.keys()
    assert float(re.search(r"ours to bare: (\S+)", done.stdout)[1]) < 1e-2, "all train on the same"


@pytest.mark.parametrize(
    "name",
    [
        "bench_gpu.py",
        "make_advice_proof.py",
        *("bench_train.py", "bench_compile.py", "bench_data.py", "bench_mixture.py", "bench_transforms.py"),
        *("make_means_matrix.py", "make_means_study.py"),
        "bench_shared_tokenizing.py",
        *("bench_checkpoint.py", "bench_monitor.py", "bench_startup.py", "screenshots.py"),
    ],
)
def test_help(name):
    done = script(name, "--help")
    assert done.returncode == 0, done.stderr
    assert "python scripts/" + name in done.stdout


def test_picture_of_a_console(tmp_path):
    assert script("picture_console.py", tmp_path).returncode == 2, "no run"
    started = {"event": "run_started", "step": 0, "total_steps": 1, "resumed": False, "model": "tiny", "device": "cpu"}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(started) + "\n")
    done = script("picture_console.py", tmp_path, "--out", tmp_path / "console.png")
    if shutil.which("chromium") is None:
        assert (done.returncode, "chromium: not found" in done.stderr) == (2, True)
        return
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "console.png") as image:
        assert image.width > 1000, "a hundred columns"
        assert len(image.convert("RGB").getcolors(1 << 24)) > 20, "letters"
