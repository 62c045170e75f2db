"""`task=plan`: what it prints and writes, what it needs, and its mistakes."""

import json
import math
from dataclasses import replace

import pytest

import pretrain
from pretrain.plan.advice import expectation
from pretrain.plan.devices import DEVICES, device_named, device_of
from pretrain.plan.plan import check_fits
from pretrain.plan.speed import planned_speed
from pretrain.plan.table import lines
from pretrain.run.planning import plan_of
from pretrain.runtime.errors import UserError
from pretrain.telemetry.peaks import PEAKS

GPU = "plan.device=H100"
ROOM = 14 << 20


@pytest.fixture(scope="module")
def config_only(tmp_path_factory):
    """The folder of The folder of a Llama of 2 layers without weights and without a tokenizer."""
    folder = tmp_path_factory.mktemp("config_only")
    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 512, "max_position_embeddings": 128}
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    return folder


def plan_with(folder, *words):
    return plan_of(pretrain.compose([f"model_name={folder}", "sequence_length=128", "task=plan", *words]))


def test_a_plan_of_a_config_without_weights(config_only, tmp_path, command):
    words = [
        f"model_name={config_only}",
        "sequence_length=128",
        "batch_size=2",
        "strategy=fsdp",
        "devices=8",
        "max_steps=10",
    ]
    words += ["precision=bf16-mixed", "gradient_accumulation_steps=4", GPU, "plan.mfu=0.4", "plan.devices=[L4]"]
    code, out, err = command(["task=plan", f"output_dir={tmp_path}", *words])
    assert code == 0, err
    assert {p.name for p in tmp_path.iterdir()} - {".lock", "logs"} == {"plan.json"}
    found = json.loads((tmp_path / "plan.json").read_text())
    layer = 4 * 64 * 64 + 3 * 64 * 128 + 2 * 64
    parameters = 2 * layer + 2 * 512 * 64 + 64
    assert found["model"] == {"name": str(config_only), "parameters": parameters, "trained": parameters}
    assert found["between_steps"]["weights"] == pytest.approx(4 * parameters / 8, rel=0.05)
    assert found["between_steps"]["moments"] == pytest.approx(8 * parameters / 8 + 21 * 512, rel=0.1)  # step counters
    assert found["peak"]["gradients"] == pytest.approx(4 * parameters / 8, rel=0.05)
    assert found["communicated"]["gathered"] == pytest.approx(4 * 2 * 2 * parameters, rel=0.01)
    assert found["communicated"]["reduced"] == pytest.approx(4 * 4 * parameters, rel=0.01)
    assert found["checkpoint"]["files"] == 16
    assert found["checkpoint"]["bytes"] == pytest.approx(12 * parameters + 8 * 21 * 512, rel=0.1)
    assert found["host_bytes"]["checkpoint copy"] == found["checkpoint"]["bytes"] / 8
    assert found["peak_bytes"] == sum(found["peak"].values()) < found["device"]["usable_bytes"]
    assert found["fits_device"] is True
    speed = found["speed"]
    flops = 6 * (2 * (layer - 2 * 64) + 512 * 64) + 6 * 2 * 64 * 128
    assert speed["flops_per_token"] == flops
    assert speed["tokens"] == 10 * 2 * 4 * 8 * 128
    assert speed["tokens_per_second"] == pytest.approx(0.4 * 989.4e12 * 8 / flops)
    assert speed["hours"] == pytest.approx(speed["tokens"] / speed["tokens_per_second"] / 3600)
    assert [fit["device"] for fit in found["fits"]] == ["H100", "L4"]
    assert f"{parameters / 1e6:.1f} M parameters · strategy=fsdp" in out
    assert "answer      fits: " in out


@pytest.mark.slow
def test_what_does_not_fit_says_what_does(config_only):
    small = replace(DEVICES["MI300X"], memory_bytes=ROOM)  # without workspaces of cuBLAS
    words = ["batch_size=8", GPU, "plan.devices=[]"]
    config = pretrain.compose([f"model_name={config_only}", "sequence_length=128", "task=plan", *words])
    plan = plan_of(config, device=small)
    assert plan.fits_device is False
    assert plan.changes[0].startswith("batch_size="), plan.changes
    first = int(plan.changes[0].split()[0].split("=")[1])
    checkpointed = next(c for c in plan.changes if "model.gradient_checkpointing=true" in c)
    assert first < 8
    assert 8 % first == 0
    assert int(checkpointed.split()[0].split("=")[1]) > first
    assert "precision=bf16-mixed" in plan.changes
    with pytest.raises(UserError, match=r"plan\.require=true: a step needs .* what needs less: batch_size="):
        check_fits(plan)
    fitting = pretrain.compose([f"model_name={config_only}", "sequence_length=128", *plan.changes[0].split()])
    assert plan_of(fitting, device=small).peak_bytes < small.usable_bytes < plan.peak_bytes


@pytest.mark.slow
def test_auto_is_what_fits(config_only):
    small = replace(DEVICES["MI300X"], memory_bytes=ROOM)  # without workspaces of cuBLAS
    words = ["batch_size=auto", "gradient_accumulation_steps=12", "plan.devices=[]"]
    config = pretrain.compose([f"model_name={config_only}", "sequence_length=128", "task=plan", *words])
    plan = plan_of(config, device=small)
    size = plan.setup["batch_size"]
    assert size * plan.setup["gradient_accumulation_steps"] == 12
    assert 1 < size <= plan.fits[0].plain < 12
    assert plan.fits_device


def test_nothing_is_guessed(config_only):
    plan = plan_with(config_only, "plan.device=cpu")
    assert plan.speed.tokens_per_second is plan.speed.hours is plan.speed.steps is None
    assert plan.data == {"tokens": None, "bytes": None}
    shown = dict(lines(plan))
    assert shown["speed"].startswith("unknown: give plan.mfu")
    assert "give max_steps" in shown["work"]


@pytest.mark.slow
def test_zero_is_estimated(config_only):
    plan = plan_with(config_only, "strategy=deepspeed", "devices=4", GPU, "precision=bf16-mixed", "plan.devices=[]")
    n = plan.model["trained"]
    assert plan.peak["weights"] == 2 * n + 4 * n / 4
    assert plan.peak["moments"] == 8 * n / 4
    assert any("estimated" in note for note in plan.notes)


def test_a_step_that_cannot_be_traced_leaves_the_rest(config_only, monkeypatch):
    def fails(*args, **options):
        raise RuntimeError("needs the values")

    monkeypatch.setattr("pretrain.plan.plan.step_memory", fails)
    plan = plan_with(config_only, GPU)
    assert plan.peak_bytes is plan.fits_device is None
    assert plan.speed.flops_per_token
    assert "needs the values" in plan.notes[0]
    with pytest.raises(UserError, match=r"plan\.require=true: whether it fits on H100 is unknown: .*needs the values"):
        check_fits(plan)


MISTAKES = {
    "plan.device=H1000": "plan.device=H1000: no such device; did you mean 'H100'",
    "plan.devices=[H100,L4O]": "plan.devices=L4O: no such device",
    "devices=0": "devices=0",
    "devices=4": "strategy=single is one process on one device",
    "sequence_length=256": "has 128 positions",
    "plan.mfu=40": "plan.mfu=40",
    "plan.at_start=sometimes": "plan.at_start='sometimes'",
    "precision=16-mixed": "precision=16-mixed needs a GPU",
    "plan.dvice=H100": "did you mean 'device'",
    "task=plam": "task='plam'",
    "model_name=/nowhere": "no such folder",
}


@pytest.mark.parametrize("word", MISTAKES)
def test_mistakes(config_only, tmp_path, command, word):
    base = [
        f"model_name={config_only}",
        "sequence_length=128",
        "task=plan",
        "plan.device=cpu",
        f"output_dir={tmp_path}",
    ]
    code, _, err = command([*base, word])
    assert code == 2
    assert MISTAKES[word] in err
    assert not (tmp_path / "plan.json").exists()


def test_devices():
    assert all(device.driver_name in PEAKS for device in DEVICES.values())
    assert device_of("h100").name == device_of("NVIDIA H100 80GB HBM3").name == "H100"
    assert device_of("rtx 4090").name == "RTX4090"
    assert device_of("A100").name == "A100-80GB"
    assert not device_of("cpu").is_gpu
    ours = device_named("NVIDIA H200", 150 << 30)
    assert (ours.name, ours.memory_bytes, ours.peak_flops("bfloat16")) == ("H200", 150 << 30, 989.5e12)
    unknown = device_named("NVIDIA Future 9", 1 << 40)
    assert (unknown.name, unknown.peak_flops("bfloat16")) == ("Future 9", None)


def test_what_a_run_expects():
    device = {"is_gpu": True, "memory_bytes": 80 << 30}
    assert expectation({"peak_bytes": 41.2 * 2**30, "device": device}) == "expects 41.2 GiB of 80.0 GiB"
    assert expectation({"peak_bytes": 2**30, "device": device | {"is_gpu": False}}) == "expects 1.0 GiB of tensors"


def test_the_speed_is_that_of_an_earlier_run_or_of_an_assumed_mfu(tmp_path, config_only):
    facts = {"device": "NVIDIA H100 80GB HBM3", "devices": 1, "sequence_length": 128, "precision": "bf16-mixed"}
    (tmp_path / "run.json").write_text(json.dumps(facts))
    end = {
        "event": "run_finished",
        "step": 9,
        "time": 1.0,
        "status": "finished",
        "tokens_per_second": 1234.5,
        "mfu": 0.25,
    }
    (tmp_path / "metrics.jsonl").write_text(json.dumps(end) + "\n")
    words = [f"model_name={config_only}", f"output_dir={tmp_path}", "sequence_length=128", "precision=bf16-mixed"]
    config = pretrain.compose(words)
    hf = config.model.build_on_meta(param_dtype=config.precision.param_dtype).hf

    def speed(device, config=config):
        return planned_speed(config, hf, device=DEVICES[device], devices=1, steps=(9, "max_steps"), global_batch=8)

    measured = speed("H100")
    assert (measured.tokens_per_second, measured.mfu, measured.source) == (1234.5, 0.25, str(tmp_path))
    assert math.isclose(measured.hours, 9 * 8 * 128 / 1234.5 / 3600)
    assert speed("A100-80GB").tokens_per_second is None, "of another device"
    assumed = pretrain.compose([*words, "plan.mfu=0.3"])
    assert speed("H100", assumed).source == "plan.mfu"
    assert speed("T4", assumed).tokens_per_second is None, "a T4 has no bf16"
