"""The shipped transforms from the command line: what is trained, exported and resumed, and mistakes."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pretrain.checkpoint.store import load
from pretrain.distributed.sharding import TensorFiles
from tests.runs import assert_same_run

PeftModel = pytest.importorskip("peft").PeftModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("levers")


@pytest.fixture
def start(folder, base_arguments, command):
    """``start(out, *arguments)`` → (exit code, stdout, stderr)."""
    common = [*base_arguments, "max_steps=6", "save_every=2", "checkpoint.keep_last=3", "evaluate_every=6"]
    return lambda out, *more: command([*common, f"output_dir={folder / out}", *more])


def cut(run, again, step):
    """A copy of ``run`` as a kill after the checkpoint of ``step`` has left it."""
    shutil.copytree(run, again)
    shutil.rmtree(again / "model", ignore_errors=True)
    for later in range(step + 2, 8, 2):
        shutil.rmtree(again / f"checkpoints/step-{later:08d}")
    return again


@pytest.mark.slow
def test_parameters_that_thaw_are_resumed_exactly_before_and_after(folder, start):
    words = ["transform=[freeze]", "transform.freeze.trainable=embed|norm", "transform.freeze.thaw_at=0.6"]
    words += ["optimizer.lr_multipliers={embed: 0.5}", "optimizer.layer_decay=0.9"]
    code, _, err = start("thawed", *words)
    assert code == 0, err
    saved = {s: load(folder / f"thawed/checkpoints/step-{s:08d}")["engine"]["optimizer"] for s in (2, 4, 6)}
    states = {step: {name.partition("/")[0] for name in sorted(files.keys())} for step, files in saved.items()}
    assert states[2] == states[4]
    assert all("embed" in name or "norm" in name for name in states[2])
    assert len(states[6]) > len(states[2])
    for step in (2, 4):
        again = cut(folder / "thawed", folder / f"again-{step}", step)
        code, _, err = start(again.name, *words)
        assert code == 0, err
        assert_same_run(again, folder / "thawed")
    facts = json.loads((folder / "thawed/run.json").read_text())
    assert facts["trained_parameters"] == facts["parameters"]


def scores(run, step):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {r["domain"]: r["loss"] for r in records if r["event"] == "evaluation" and r["step"] == step}


def same_weights(one, other):
    ours, theirs = (TensorFiles(sorted(folder.glob("*.safetensors"))) for folder in (one, other))
    names = sorted(ours.keys())
    return ours.keys() == theirs.keys() and all(torch.equal(ours.read(n), theirs.read(n)) for n in names)


LORA = [
    "transform=[lora]",
    "transform.lora.rank=4",
    "transform.lora.dropout=0.1",
    "transform.lora.modules_to_save=[head]",
]


def test_lora_is_trained_resumed_exported_and_continued(folder, start, tiny_model):
    code, _, err = start("lora", *LORA, "lr=1e-2")
    assert code == 0, err
    run = folder / "lora"
    saved = load(run / "checkpoints/step-00000006")["engine"]
    kinds = {name.partition("/")[0].split(".")[-3] for name in sorted(saved["optimizer"].keys())}
    assert kinds <= {"lora_A", "lora_B", "model", "transformer", "lm_head"}
    facts = json.loads((run / "run.json").read_text())
    assert 0 < facts["trained_parameters"] < facts["parameters"]
    again = cut(run, folder / "lora-again", 2)
    code, _, err = start(again.name, *LORA, "lr=1e-2")
    assert code == 0, err
    assert_same_run(again, run)
    assert same_weights(again / "model", run / "model")
    assert same_weights(again / "adapter", run / "adapter")
    code, _, err = start("lora-out", *LORA, "task=export", f"model_name={run / 'checkpoints/step-00000006'}")
    assert code == 0, err
    assert same_weights(folder / "lora-out/model", run / "model")
    assert same_weights(folder / "lora-out/adapter", run / "adapter")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
        before = base(ids).logits
        adapted = PeftModel.from_pretrained(base, run / "adapter").eval()(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32).eval()(ids).logits
    torch.testing.assert_close(adapted, merged, rtol=1e-4, atol=1e-5)
    assert (before - merged).abs().max() > 1e-3
    more = ["transform=[lora]", f"transform.lora.adapter={run / 'adapter'}", "max_steps=1"]
    code, _, err = start("lora-more", *more)
    assert code == 0, err
    assert scores(folder / "lora-more", 0) == pytest.approx(scores(run, 6), rel=1e-5)


@pytest.mark.slow
def test_expanded_models_score_the_same_at_the_start(folder, start):
    words = ["transform=[expand]", "transform.expand.blocks=1"]
    for name, given in (("plain", []), ("expanded", words)):
        code, _, err = start(name, *given)
        assert code == 0, err
    assert scores(folder / "expanded", 0) == scores(folder / "plain", 0)
    assert scores(folder / "expanded", 6) != scores(folder / "plain", 6)
    number = json.loads((folder / "plain/model/config.json").read_text())
    assert json.loads((folder / "expanded/model/config.json").read_text()) != number
    _, info = AutoModelForCausalLM.from_pretrained(folder / "expanded/model", output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"]
    again = cut(folder / "expanded", folder / "expanded-again", 2)
    code, _, err = start(again.name, *words)
    assert code == 0, err
    assert_same_run(again, folder / "expanded")


def test_a_larger_vocabulary(folder, start, tiny_model):
    words = ["transform=[vocabulary]", "transform.vocabulary.size=40", "transform.vocabulary.only_new_rows=true"]
    code, out, err = start("words", *words, "transform.vocabulary.thaw_at=0.5")
    assert code == 0, err
    assert "tokens a word" in out + err
    assert "compare bits_per_byte, not perplexity" in out + err
    run = folder / "words"
    tokenizer, old = AutoTokenizer.from_pretrained(run / "model"), AutoTokenizer.from_pretrained(tiny_model)
    assert len(tokenizer) == len(old) + 40
    model, info = AutoModelForCausalLM.from_pretrained(run / "model", output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"] | info["unexpected_keys"]
    assert len(model.get_input_embeddings().weight) % 64 == 0
    again = cut(run, folder / "words-again", 2)
    code, _, err = start(again.name, *words, "transform.vocabulary.thaw_at=0.5")
    assert code == 0, err
    assert_same_run(again, run)
    checkpoint = run / "checkpoints/step-00000006"
    more = [*words, "transform.vocabulary.thaw_at=0.5", f"model_name={checkpoint}"]
    for task in ("evaluation", "export"):
        code, _, err = start(f"words-{task}", *more, f"task={task}")
        assert code == 0, err
    assert same_weights(folder / "words-export/model", run / "model")
    results = json.loads((folder / "words-evaluation/run.json").read_text())["results"]
    assert {name: score["loss"] for name, score in results.items()} == pytest.approx(scores(run, 6), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "deepspeed"])
@pytest.mark.parametrize(
    "words",
    [
        [*LORA[:2], "transform.lora.dora=true"],
        ["transform=[expand,lora]", "transform.lora.rank=4", "transform.expand.blocks=1"],
        ["transform=[vocabulary]", "transform.vocabulary.tokens=[kubectl]", "transform.vocabulary.start=distribution"],
        ["transform=[lora]", "transform.lora.rank=4", "model.gradient_checkpointing=true"],
    ],
    ids=["dora", "expand-lora", "vocabulary", "checkpointing"],
)
def test_two_processes_train_the_model_of_one(folder, start, strategy, words):
    name = f"{strategy}-{abs(hash(tuple(words)))}"
    code, _, err = start(f"{name}-one", *words)
    assert code == 0, err
    more = [f"strategy={strategy}", "devices=2", "batch_size=1", *words]
    more += ["strategy.zero_stage=3"] if strategy == "deepspeed" else []
    code, _, err = start(name, *more)
    assert code == 0, err
    assert scores(folder / name, 0) == pytest.approx(scores(folder / f"{name}-one", 0), rel=1e-5)
    assert scores(folder / name, 6) == pytest.approx(scores(folder / f"{name}-one", 6), rel=1e-4)
    again = cut(folder / name, folder / f"{name}-again", 2)
    code, _, err = start(again.name, *more)
    assert code == 0, err
    assert_same_run(again, folder / name)
