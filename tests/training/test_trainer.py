"""The loop against plain PyTorch, and what must not change it: accumulation, evaluation cadence, logging."""

import json

import pytest
import torch
from torch.nn import functional as F

from pretrain.data.loader import Loader
from pretrain.run.prepare import prepare
from pretrain.telemetry.sinks.jsonl import read_records


def losses(run) -> list[float]:
    return [r["loss"] for r in read_records(run / "metrics.jsonl") if r["event"] == "train"]


@pytest.fixture
def view(base_arguments):
    return view_of(base_arguments)


def view_of(base_arguments):
    """The training documents of `base_arguments`, through the store that the run itself uses."""
    return prepared_of(base_arguments)[1].train.parts[0].view


def prepared_of(base_arguments):
    """The config of `base_arguments`, and its data as the run itself prepares it."""
    from pretrain.config.compose import run_config

    config = run_config(base_arguments)
    return config, prepare(config)


@pytest.mark.parametrize("document_mask", [False, True])
def test_equals_a_bare_loop(document_mask, base_arguments, command, tmp_path, tiny_model, view):
    """Ten steps with accumulation, clipping and warm-up, written out in plain PyTorch without any of our loop."""
    from transformers import AutoModelForCausalLM

    run = tmp_path / "run"
    code, _, err = command(
        [
            *base_arguments,
            f"output_dir={run}",
            "max_steps=10",
            f"dataset.document_mask={str(document_mask).lower()}",
            "warmup_proportion=0.3",
            "scheduler=constant",
            "grad_clip=0.5",
            "seed=5",
        ]
    )
    assert code == 0, err
    records = [r for r in read_records(run / "metrics.jsonl") if r["event"] == "train"]

    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="sdpa").train()
    decay = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    loader = Loader(view, sequence_length=32, seed=5, batch_size=2, accumulation=2, document_mask=document_mask)
    batches = iter(loader)
    torch.manual_seed(5)
    for step, record in enumerate(records):
        batch = next(batches)
        tokens = int((batch.labels != -100).sum())
        total = 0.0
        for rows in (slice(0, 2), slice(2, 4)):
            positions = {} if batch.position_ids is None else {"position_ids": batch.position_ids[rows]}
            logits = model(input_ids=batch.input_ids[rows], use_cache=False, **positions).logits
            loss = F.cross_entropy(logits.flatten(0, 1), batch.labels[rows].flatten(), reduction="sum") / tokens
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        lr = 1e-3 * min(1.0, (step + 1) / 3)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        assert record["lr"] == pytest.approx(lr)
        assert record["loss"] == pytest.approx(total, abs=1e-5)
        assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_accumulation_is_one_large_batch(base_arguments, command, tmp_path, tiny_model):
    """Documents of different lengths under a mask: micro-batches have different numbers of targets, and the mean of
    their means would be wrong. (Attention dropout draws per micro-batch, so the model here has none.)"""
    import shutil

    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.0}))
    common = [*base_arguments, f"model_name={model}", "max_steps=8", "dataset.document_mask=true"]
    for name, split in (
        ("a", ["batch_size=8", "gradient_accumulation_steps=1"]),
        ("b", ["batch_size=1", "gradient_accumulation_steps=8"]),
    ):
        code, _, err = command([*common, f"output_dir={tmp_path / name}", *split])
        assert code == 0, err
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), abs=2e-6)


def test_looking_changes_nothing(base_arguments, command, tmp_path):
    """Evaluating, saving and logging more often leave every loss as it was, to the last bit."""
    settings = {
        "often": ["evaluate_every=1", "save_every=1", "log_every=1"],
        "never": [
            "evaluate_every=null",
            "save_every=null",
            "log_every=1",
            "evaluation=new_only",
            "~evaluation.domains.base",
        ],
    }
    settings["never"] = ["evaluate_every=null", "save_every=null", "log_every=1", "sink=jsonl"]
    for name, more in settings.items():
        code, _, err = command([*base_arguments, f"output_dir={tmp_path / name}", "max_steps=6", *more])
        assert code == 0, err
    assert losses(tmp_path / "often") == losses(tmp_path / "never")


def test_no_document_is_held_out_and_trained(base_arguments, view, command):
    train, held_out = view, view.store.views(held_out=0.05)[1]
    assert not set(train.document_ids(0, train.num_tokens)) & set(held_out.document_ids(0, held_out.num_tokens))
    assert held_out.num_documents > 0


def test_epochs_become_steps(base_arguments, command, tmp_path, view):
    run = tmp_path / "run"
    code, _, err = command(
        [*base_arguments, f"output_dir={run}", "max_steps=null", "number_epochs=0.5", "evaluate_every=null"]
    )
    assert code == 0, err
    steps = [r["step"] for r in read_records(run / "metrics.jsonl")][-1]
    sequences = (view.num_tokens - 1) // 32
    assert steps == int(sequences * 0.5 / 4)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-mixed"])
def test_precisions_learn_and_resume_bit_for_bit(precision, base_arguments, command, tmp_path):
    """The same run in one go and in two halves."""
    from safetensors.torch import load_file

    common = [*base_arguments, f"precision={precision}", "max_steps=8", "scheduler=constant", "evaluate_every=null"]
    common += ["precision.allow_cpu=true"] if precision == "16-mixed" else []
    halves = [*common, f"output_dir={tmp_path / 'halves'}"]
    for arguments in ([*common, f"output_dir={tmp_path / 'whole'}"], [*halves, "max_steps=4"], halves):
        code, _, err = command([*arguments, "warmup_proportion=0"])
        assert code == 0, err
    whole, halved = (losses(tmp_path / name) for name in ("whole", "halves"))
    assert whole == halved
    assert whole[-1] < whole[0]
    for name in ("model", "optimizer"):
        a, b = (
            load_file(tmp_path / n / "checkpoints/step-00000008" / f"{name}.safetensors") for n in ("whole", "halves")
        )
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_fp16_counts_the_steps_it_skips(base_arguments, command, tmp_path):
    """The scaler begins at 65536, which overflows on this model at first: skipped steps are counted, then it learns."""
    run = tmp_path / "run"
    more = ["precision=16-mixed", "precision.allow_cpu=true", "evaluate_every=null", "save_every=null"]
    code, _, err = command([*base_arguments, f"output_dir={run}", *more, "max_steps=30", "lr=5e-3"])
    assert code == 0, err
    train = [r for r in read_records(run / "metrics.jsonl") if r["event"] == "train"]
    skipped = [r["skipped_steps"] for r in train]
    assert skipped == sorted(skipped)
    infinite = [r["grad_norm"] is None for r in train]
    assert skipped[-1] == sum(infinite)
    assert [r["loss_scale"] for r in train] == [65536 / 2**n for n in skipped]
    assert not (run / "quarantine.jsonl").exists(), "the scaler finds its scale; no batch is to blame"
    assert train[-1]["loss"] < train[0]["loss"]
