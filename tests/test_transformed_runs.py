"""Runs with transforms, from the command line: what they save, resume from, export, and refuse."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from pretrain.checkpoint.store import load
from pretrain.checkpoint.weights import saved_transforms
from pretrain.config.compose import run_config
from pretrain.distributed.sharding import TensorFiles
from pretrain.run.fingerprint import check_same_run
from pretrain.runtime.errors import UserError
from tests.runs import assert_same_numbers

CONF = {
    "adapter": "adapter: {_target_: tests.transforms.Lora, rank: 4, alpha: 8.0, targets: '[qv]_proj$'}",
    "still": "still: {_target_: tests.transforms.Freeze, frozen: embed}",
}
PARAMETERS = 300 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32
LORA = 2 * 2 * 4 * (32 + 32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transformed")
    for name, text in CONF.items():
        file = folder / "conf" / "transform" / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    return folder


@pytest.fixture
def start(folder, base_arguments, command):
    """``start(out, *arguments)`` → (exit code, stdout, stderr)."""
    common = [
        "--config-dir",
        str(folder / "conf"),
        *base_arguments,
        "max_steps=8",
        "save_every=4",
        "allow_targets=[tests]",
    ]
    return lambda out, *more: command([*common, f"output_dir={folder / out}", *more])


@pytest.fixture
def lora(folder, start):
    """A finished run with LoRA."""
    if not (folder / "lora").exists():
        code, out, err = start("lora", "transform=[adapter]")
        assert code == 0, err
        (folder / "lora.out").write_text(out)
    return folder / "lora"


def weights(run):
    return load(run / "checkpoints/step-00000008")["engine"]["model"]


def test_only_the_new_weights_are_trained(lora, folder):
    facts = json.loads((lora / "run.json").read_text())
    assert (facts["parameters"], facts["trained_parameters"]) == (PARAMETERS + LORA, LORA)
    assert f"{LORA:,} of them trained" in (folder / "lora.out").read_text()
    assert facts["flops_per_token"] is None
    engine = load(lora / "checkpoints/step-00000008")["engine"]
    assert {n.rpartition("/")[0].rpartition(".")[2] for n in sorted(engine["optimizer"].keys())} == {"a", "b"}
    assert "model.layers.1.self_attn.q_proj.base.weight" in sorted(engine["model"].keys())


def test_plain_transformers_reads_the_exported_model(lora, start, folder):
    read, info = AutoModelForCausalLM.from_pretrained(lora / "model", output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"] | info["unexpected_keys"]
    trained, merged = weights(lora), read.state_dict()
    layer = "model.layers.0.self_attn.q_proj"
    a, b, base = (trained.read(f"{layer}.{part}") for part in ("a", "b", "base.weight"))
    torch.testing.assert_close(merged[f"{layer}.weight"], base + 2 * b @ a, rtol=0, atol=1e-7)
    assert not torch.equal(merged[f"{layer}.weight"], base)
    assert torch.equal(merged["model.norm.weight"], trained.read("model.norm.weight"))
    code, _, err = start(
        "exported", "task=export", f"model_name={lora / 'checkpoints/step-00000008'}", "transform=[adapter]"
    )
    assert code == 0, err
    ours, theirs = (TensorFiles([f / "model/model.safetensors"]) for f in (folder / "exported", lora))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours.read(name), theirs.read(name)) for name in sorted(theirs.keys()))
    cards = [f / "README.md" for f in (lora / "checkpoints/step-00000008", folder / "exported/model", lora / "model")]
    assert ["can't read them" in card.read_text() for card in cards] == [True, False, False]


def test_a_run_continues_exactly(lora, start, folder):
    again = folder / "again"
    shutil.copytree(lora, again)
    shutil.rmtree(again / "checkpoints/step-00000008")
    shutil.rmtree(again / "model")
    code, _, err = start("again", "transform=[adapter]")
    assert code == 0, err
    assert_same_numbers(again, lora)
    ours, theirs = weights(again), weights(lora)
    assert all(torch.equal(ours.read(name), theirs.read(name)) for name in sorted(theirs.keys()))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["transform=[adapter]", "transform.adapter.rank=2"], "transform.adapter.rank: 4 → 2"),
        (
            ["transform=[adapter,still]"],
            "transform.still: None → {'_target_': 'tests.transforms.Freeze', 'frozen': 'embed'}",
        ),
        ([], "transform: {'adapter': "),
    ],
)
def test_other_transforms_do_not_resume_a_run(lora, start, given, said):
    code, _, err = start("lora", *given, "max_steps=12")
    assert code == 2
    line = [line for line in err.splitlines() if line.startswith("error: ")]
    assert said in line[0]
    assert "resume_allow" not in line[0]


def test_a_checkpoint_is_loaded_with_its_transforms_alone(lora, start, folder):
    checkpoint = lora / "checkpoints/step-00000008"
    assert saved_transforms(checkpoint) == [
        {"_target_": "tests.transforms.Lora", "rank": 4, "alpha": 8.0, "targets": "[qv]_proj$"}
    ]
    found = {}
    for out, name, given in (("a", checkpoint, ["transform=[adapter]"]), ("c", lora, [])):
        code, _, err = start(
            f"scored-{out}", "task=evaluation", "evaluation.batch_size=2", f"model_name={name}", *given
        )
        assert code == 0, err
        found[out] = json.loads((folder / f"scored-{out}/run.json").read_text())
    results = json.loads((lora / "run.json").read_text())["results"]
    for facts in found.values():
        assert {n: s["loss"] for n, s in facts["results"].items()} == pytest.approx(
            {n: s["loss"] for n, s in results.items()}
        )
    assert [facts["parameters"] for facts in found.values()] == [PARAMETERS + LORA, PARAMETERS]
    for task, given in (
        ("evaluation", []),
        ("generation", ["transform=[still]"]),
        ("pretraining", []),
        ("export", []),
    ):
        code, _, err = start("refused", f"task={task}", f"model_name={checkpoint}", *given)
        assert code == 2
        (line,) = (line for line in err.splitlines() if line.startswith("error: "))
        assert (
            f"model_name={checkpoint}: the weights of this checkpoint are transformed by Lora(rank=4, alpha=8.0" in line
        )
        assert f"this command has {'Freeze(frozen=embed)' if given else 'none'}. Give the same" in line


@pytest.mark.slow
def test_a_new_run_starts_from_the_weights_of_another(lora, start, folder):
    code, _, err = start("second", "transform=[adapter]", f"model_name={lora}", "max_steps=1")
    assert code == 0, err
    before = json.loads((lora / "run.json").read_text())["results"]
    first = [json.loads(line) for line in (folder / "second/metrics.jsonl").read_text().splitlines()]
    scores = {r["domain"]: r["loss"] for r in first if r["event"] == "evaluation" and r["step"] == 0}
    assert scores == pytest.approx({name: score["loss"] for name, score in before.items()})
    assert json.loads((folder / "second/run.json").read_text())["parameters"] == PARAMETERS + LORA


def test_an_export_that_would_fail_is_found_before_training(start, folder):
    code, _, err = start("no-export", "transform=[adapter]", "transform.adapter._target_=tests.transforms.NotExported")
    assert code == 2
    (line,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert (
        "export() does not return the weights of LlamaForCausalLM: model.layers.0.self_attn.q_proj.weight is missing"
        in line
    )
    assert not (folder / "no-export/checkpoints").exists()


def test_a_checkpoint_of_an_earlier_version_has_no_transforms(lora, folder, tmp_path):
    state = json.loads((lora / "checkpoints/step-00000008/state.json").read_text())
    del state["identity"]["transforms"]
    (tmp_path / "state.json").write_text(json.dumps(state))
    shutil.copy(lora / "config.yaml", tmp_path)
    config = run_config(["allow_targets=[tests]"])
    check_same_run(tmp_path, {**state["identity"], "transforms": []}, config, model_config={}, files="")
    with pytest.raises(UserError, match="can't be continued with other settings"):
        check_same_run(tmp_path, {**state["identity"], "transforms": [{}]}, config, model_config={}, files="")


def test_nothing_left_to_train(start):
    code, _, err = start("nothing", "transform=[still]", "transform.still.frozen=.")
    assert code == 2
    assert [line for line in err.splitlines() if line.startswith("error: ")] == [
        "error: transform=[still]: no parameter of the model is left to train"
    ]


@pytest.mark.slow
def test_processes_that_hold_shards_continue_the_run_of_one(lora, start, folder):
    again = folder / "sharded"
    shutil.copytree(lora, again)
    shutil.rmtree(again / "checkpoints/step-00000008")
    shutil.rmtree(again / "model")
    more = ["strategy=fsdp", "strategy.state_dict_type=sharded", "devices=2", "batch_size=1", "checkpoint.export=save"]
    code, _, err = start("sharded", "transform=[adapter]", *more)
    assert code == 0, err
    facts = json.loads((again / "run.json").read_text())
    assert (facts["parameters"], facts["trained_parameters"]) == (PARAMETERS + LORA, LORA)
    read = AutoModelForCausalLM.from_pretrained(again / "model", dtype=torch.float32).state_dict()
    expected = AutoModelForCausalLM.from_pretrained(lora / "model", dtype=torch.float32).state_dict()
    assert read.keys() == expected.keys()
    assert all(torch.allclose(read[name], expected[name], atol=5e-3) for name in expected)
    name = "model.layers.0.self_attn.v_proj"
    ours = weights(again)
    merged = ours.read(f"{name}.base.weight") + 2 * ours.read(f"{name}.b") @ ours.read(f"{name}.a")
    torch.testing.assert_close(read[f"{name}.weight"], merged, rtol=0, atol=1e-7)
