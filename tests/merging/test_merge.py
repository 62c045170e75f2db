"""`task=merge`: every method against a plain computation on whole models, and what can't be merged."""

from __future__ import annotations

import json
import re
import weakref
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from pretrain.distributed.sharding import TensorFiles, TensorShard, write
from pretrain.merging.config import MergeConfig
from pretrain.merging.decay_weights import decay_weights
from pretrain.merging.merge import open_merge, write_merged
from pretrain.models.causal_lm import Pretrained
from pretrain.runtime.errors import UserError
from tests.conftest import SHAPES

SPEC = Pretrained(name_or_path="sample")
Weights = dict[str, Tensor]


def model(folder: Path, tokenizer, *, seed: int, shape: str = "llama", dtype=torch.float32, **changes) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(**SHAPES[shape] | {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0} | changes)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer) -> list[Path]:
    """Three models of one architecture: the base and two others."""
    return [model(tmp_path_factory.mktemp(f"m{seed}"), tokenizer, seed=seed) for seed in range(3)]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model, corpus) -> Path:
    """A run of 4 steps that keeps the checkpoint of each."""
    from pretrain.config.compose import run_config
    from pretrain.launch.library import train

    words = [
        f"model_name={tiny_model}",
        "dataset=local",
        f"dataset.nameOrPath={corpus}",
        "evaluation=new_only",
        "lr=1e-2",
    ]
    words += ["max_steps=4", "save_every=1", "checkpoint.keep_last=null", "evaluation.max_tokens=100", "sink=[jsonl]"]
    words += [
        "sequence_length=32",
        "evaluation.samples=0",
        "evaluate_every=null",
        f"output_dir={tmp_path_factory.mktemp('run')}",
    ]
    return train(run_config(words)).folder


def merged(folder: Path, *names: Path, save_dtype: str | None = None, shard_size: str = "5GB", **options) -> Weights:
    config = MergeConfig(models=[str(name) for name in names], **options)
    write_merged(open_merge(config, SPEC), folder, shard_size=shard_size, save_dtype=save_dtype)
    return weights_of(folder)


def weights_of(folder: Path) -> Weights:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def assert_close(ours: Weights, expected: Weights, **tolerance) -> None:
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def slerp_of(a: Tensor, b: Tensor, t: float) -> Tensor:
    x, y = a.double().flatten(), b.double().flatten()
    cosine = x @ y / (x.norm() * y.norm())
    if abs(cosine) > 0.9995:
        return ((1 - t) * a.double() + t * b.double()).float()
    angle = torch.arccos(cosine)
    return ((torch.sin((1 - t) * angle) * a.double() + torch.sin(t * angle) * b.double()) / torch.sin(angle)).float()


def ties_of(base: Tensor, others: list[Tensor], weights: list[float], *, density: float, scale: float) -> Tensor:
    """As the paper has it, value by value."""
    changes = []
    for other in others:
        change = (other - base).flatten()
        kept = sorted(range(len(change)), key=lambda i, c=change: -abs(float(c[i])))[
            : max(1, round(density * len(change)))
        ]
        changes.append([float(change[i]) if i in set(kept) else 0.0 for i in range(len(change))])
    found = []
    for values in zip(*changes, strict=True):
        sign = sum(w * v for w, v in zip(weights, values, strict=True))
        agreeing = [(w, v) for w, v in zip(weights, values, strict=True) if v * sign > 0]
        found.append(sum(w * v for w, v in agreeing) / sum(w for w, _ in agreeing) if agreeing else 0.0)
    return base + scale * torch.tensor(found).reshape(base.shape)


def test_linear(models, tmp_path) -> None:
    a, b, c = map(weights_of, models)
    expected = {name: (a[name] + 2 * b[name] + 5 * c[name]) / 8 for name in a}
    assert_close(merged(tmp_path / "m", *models, weights=[1, 2, 5]), expected)
    assert_close(merged(tmp_path / "equal", *models[:2]), {name: (a[name] + b[name]) / 2 for name in a})
    only = merged(tmp_path / "only", *models, weights=[0, 3, 0])
    assert all(torch.equal(only[name], b[name]) for name in b), "bit for bit"


@pytest.mark.parametrize("t", [0.0, 0.25, 1.0])
def test_slerp(models, tmp_path, t) -> None:
    a, b = map(weights_of, models[:2])
    ours = merged(tmp_path / "m", *models[:2], method="slerp", weights=[1 - t, t])
    assert_close(ours, {name: slerp_of(a[name], b[name], t) for name in a}, rtol=1e-5, atol=1e-6)


def test_task_arithmetic(models, tmp_path) -> None:
    base, a, b = map(weights_of, models)
    options = {"method": "task_arithmetic", "base": str(models[0]), "weights": [0.5, -1.5], "scale": 0.4}
    expected = {n: base[n] + 0.4 * (0.5 * (a[n] - base[n]) - 1.5 * (b[n] - base[n])) for n in base}
    assert_close(merged(tmp_path / "m", *models[1:], **options), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("density", [1e-9, 0.3, 1.0])
def test_ties(tmp_path, tokenizer, density) -> None:
    small = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    models = [model(tmp_path / str(seed), tokenizer, seed=seed, **small) for seed in range(3)]
    base, a, b = map(weights_of, models)
    options = {"method": "ties", "base": str(models[0]), "weights": [1.0, 0.7], "scale": 0.9, "density": density}
    ours = merged(tmp_path / "m", *models[1:], **options)
    own = {"density": density, "scale": 0.9}
    names = [name for name in base if "embed" not in name and "lm_head" not in name]
    expected = {n: ties_of(base[n], [a[n], b[n]], [1.0, 0.7], **own) for n in names}
    assert_close({n: ours[n] for n in names}, expected, rtol=1e-5, atol=1e-6)


def test_wsm_weights_are_those_of_the_paper() -> None:
    """The i-th update between the checkpoints is scaled by the decay at its time."""
    assert decay_weights([10, 20, 30, 40], "linear") == pytest.approx([0.25] * 4)
    assert decay_weights([5, 10], "cosine") == pytest.approx([0.5, 0.5])
    assert decay_weights([10, 20, 30, 40], "sqrt") == pytest.approx(
        [0.5, 0.5**0.5 - 0.5, 0.75**0.5 - 0.5**0.5, 1 - 0.75**0.5]
    )
    uneven = decay_weights([0, 10, 40], "linear")  # the decay would end at step 60
    assert uneven == pytest.approx([1 / 6, 1 / 2, 1 / 3])
    updates = [torch.randn(5), torch.randn(5), torch.randn(5)]
    points = [torch.zeros(5), updates[0], updates[0] + updates[1], sum(updates)]
    found = sum(c * point for c, point in zip(decay_weights([1, 2, 3, 4], "sqrt"), points, strict=True))
    expected = sum((1 - (i / 4) ** 0.5) * update for i, update in enumerate(updates, start=1))
    torch.testing.assert_close(found, expected)


def test_wsm_of_a_run(run, tmp_path) -> None:
    every = [load_file(run / "checkpoints" / f"step-{step:08d}" / "model.safetensors") for step in (2, 3, 4)]
    ours = merged(tmp_path / "m", run, method="wsm", last=3, decay="linear")
    assert_close(ours, {name: sum(one[name] for one in every) / 3 for name in every[0]})
    assert "checkpoints" not in (tmp_path / "m" / "README.md").read_text()
    assert f"`{run.name}/step-00000003`" in (tmp_path / "m" / "README.md").read_text()
    mixed = [run / "checkpoints" / f"step-{step:08d}" for step in (4, 2)]
    half = 0.5**0.5
    two = merged(tmp_path / "two", *mixed, method="wsm")
    assert_close(two, {n: half * every[0][n] + (1 - half) * every[2][n] for n in ours})
    with pytest.raises(UserError, match="has 4 complete checkpoints, 5 are needed"):
        merged(tmp_path / "more", run, method="wsm", last=5)
    with pytest.raises(UserError, match=r"model: not a checkpoint of a run; wsm merges those"):
        merged(tmp_path / "more", run / "model", mixed[0], method="wsm")
    with pytest.raises(UserError, match="are both of step 4"):
        merged(tmp_path / "more", run, mixed[0], method="wsm")


def sharded_copy(folder: Path, to: Path) -> Path:
    """The model as two processes would have written it, each with half of the rows."""
    to.mkdir()
    weights = weights_of(folder)
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (to / file.name).write_bytes(file.read_bytes())
    for rank in (0, 1):
        halves = {n: (0, len(t) // 2) if rank == 0 else (len(t) // 2, len(t)) for n, t in weights.items()}
        shards = {n: TensorShard(weights[n][a:b].clone(), a, tuple(weights[n].shape)) for n, (a, b) in halves.items()}
        write(to / f"model.rank-{rank}.safetensors", shards)
    return to


def test_shards_dtypes_and_small_files(models, tmp_path, tokenizer) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    half = model(tmp_path / "half", tokenizer, seed=5, dtype=torch.bfloat16)
    pieces = sharded_copy(models[1], tmp_path / "pieces")
    a, b = weights_of(models[1]), weights_of(half)
    ours = merged(tmp_path / "m", pieces, half, weights=[3, 1], shard_size="20KB")
    assert_close(ours, {n: 0.75 * a[n] + 0.25 * b[n].float() for n in a})
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == a.keys()
    assert len(set(index["weight_map"].values())) > 3
    found = merged(tmp_path / "first", half, pieces)
    assert {t.dtype for t in found.values()} == {torch.bfloat16}, "that of the first model"
    assert json.loads((tmp_path / "first" / "config.json").read_text())["dtype"] == "bfloat16"
    lower = merged(tmp_path / "lower", pieces, half, save_dtype="float16")
    assert_close(lower, {n: ((a[n] + b[n].float()) / 2).half() for n in a})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert torch.equal(loaded.lm_head.weight, ours["lm_head.weight"])
    assert len(AutoTokenizer.from_pretrained(tmp_path / "m")) == 300


def test_a_tied_head_is_merged_once(tmp_path, tokenizer) -> None:
    """Some files hold the head that is the embedding a second time."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    first, second = (model(tmp_path / str(seed), tokenizer, seed=seed, shape="llama-tied") for seed in (0, 1))
    twice = load_file(first / "model.safetensors")
    save_file(
        twice | {"lm_head.weight": twice["model.embed_tokens.weight"].clone()},
        first / "model.safetensors",
        {"format": "pt"},
    )
    ours = merged(tmp_path / "m", first, second)
    assert "lm_head.weight" not in ours
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, ours["model.embed_tokens.weight"])


@pytest.mark.parametrize("method", ["linear", "slerp", "task_arithmetic", "ties"])
def test_one_tensor_of_each_model_is_in_memory(models, tmp_path, monkeypatch, method) -> None:
    live: dict[int, int] = {}
    most = 0
    read = TensorFiles.read

    def traced(self: TensorFiles, *given) -> Tensor:
        nonlocal most
        tensor = read(self, *given)
        if tensor.numel() > 1:
            live[id(self)] = live.get(id(self), 0) + 1
            most = max(most, *live.values())
            weakref.finalize(tensor, lambda: live.__setitem__(id(self), live[id(self)] - 1))
        return tensor

    monkeypatch.setattr(TensorFiles, "read", traced)
    base = {"base": str(models[2])} if method in ("task_arithmetic", "ties") else {}
    merged(tmp_path / "m", *models[:2], method=method, **base)
    assert most == 1
    assert set(live.values()) == {0}
    assert len(live) == (3 if base else 2)


def test_from_the_command_line(models, run, tmp_path, command) -> None:
    words = ["task=merge", f"merge.models=[{run},{run}/model,sample]", f"output_dir={tmp_path / 'x'}"]
    code, _, err = command(words)
    assert code == 2
    assert err.strip() == (
        "error: merge.models: these models can't be merged: "
        f"model.embed_tokens.weight is [300, 32] in {run} and [4096, 128] in sample, "
        f"model.layers.0.self_attn.q_proj.weight is [32, 32] in {run} and [128, 128] in sample, "
        f"model.layers.0.self_attn.k_proj.weight is [32, 32] in {run} and [64, 128] in sample, and 53 more"
    )
    words = ["task=merge", f"merge.models=[{models[0]},{models[1]}]", "merge.method=ties", f"merge.base={models[2]}"]
    code, out, err = command([*words, f"output_dir={tmp_path / 'm'}"])
    assert code == 0, err
    assert out.splitlines()[-1] == f"model    {tmp_path / 'm' / 'model'}"
    theirs = yaml.safe_load((tmp_path / "m" / "mergekit_config.yml").read_text())
    assert theirs == {
        "models": [{"model": str(m), "parameters": {"weight": 0.5, "density": 0.2}} for m in models[:2]],
        "merge_method": "ties",
        "base_model": str(models[2]),
        "parameters": {"normalize": True, "lambda": 1.0},
        "dtype": "float32",
        "tokenizer_source": "base",
    }
    card = (tmp_path / "m" / "model" / "README.md").read_text()
    assert "method `ties`" in card
    assert f"| `{models[0].name}` | 0.5 |" in card
    assert str(models[0].parent) not in card, "no path of this machine"
    code, _, err = command([*words, f"output_dir={tmp_path / 'm'}"])
    assert code == 2
    assert "holds a model already" in err


def test_tokenizers_that_differ(models, tmp_path, tokenizer) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in models[1].iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    names = [name for name, number in vocabulary.items() if number in (260, 261)]
    vocabulary[names[0]], vocabulary[names[1]] = vocabulary[names[1]], vocabulary[names[0]]
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"merge.models: the tokenizers of .* differ in 2 tokens, e.g. .* is 26. in"):
        merged(tmp_path / "m", models[0], other)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"merge.models=\[\]: task=merge needs the models to merge"),
        ({"models": ["a"]}, "needs at least two models, merge.models has 1"),
        ({"models": ["a", "b", "c"], "method": "slerp"}, "slerp: needs two models, merge.models has 3"),
        ({"models": ["a"], "method": "ties"}, "merge.base=null: ties adds changes to a base model"),
        ({"models": ["a", "b"], "base": "c"}, "merge.base=c: linear has no base"),
        ({"models": ["a", "b"], "weights": [1.0]}, "merge.weights has 1 numbers, merge.models has 2 models"),
        ({"models": ["a", "b"], "weights": [1, -1]}, "their sum must be above 0"),
        ({"models": ["a", "b"], "method": "slerp", "weights": [3, -1]}, "slerp takes weights of at least 0"),
        ({"models": ["a"], "method": "wsm", "weights": [1]}, "wsm takes its weights from merge.decay"),
    ],
    ids=range(9),
)
def test_what_can_not_be_merged(given, message) -> None:
    with pytest.raises(UserError, match=message):
        MergeConfig(**given).check()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["merge.models=[a]", "merge.method=tie"], "merge.method='tie': .*; did you mean 'ties'"),
        (["merge.models=[sample,nowhere/here/it]"], "merge.models=nowhere/here/it: no such folder"),
        (["merge.models=[sample]"], "needs at least two models, merge.models has 1"),
    ],
    ids=["method", "folder", "count"],
)
def test_bad_input_is_one_line(words, message, tmp_path, command) -> None:
    code, _, err = command(["task=merge", f"output_dir={tmp_path / 'm'}", *words])
    assert code == 2
    assert err.count("\n") == 1
    assert re.search(message, err), err
    assert not (tmp_path / "m" / "model").exists()
