"""What a model wants in fp32 stays in it beside 16-bit weights, under every strategy and in what is saved: the same types and
values as `from_pretrained` gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from pretrain.data.batch import Batch
from pretrain.distributed.context import DistributedContext
from pretrain.models.causal_lm import Pretrained, Scratch
from pretrain.models.hub import export
from pretrain.models.hub.files import SAMPLE
from pretrain.models.model_factory import ModelFactory
from pretrain.strategy.ddp import Ddp
from pretrain.strategy.fsdp import Fsdp
from pretrain.strategy.single import Single
from tests.strategy.ranks import as_rank, set_up

KEPT = {
    "deepseek_v3": "e_score_correction_bias",  # a buffer
    "dots1": "e_score_correction_bias",
    "ernie4_5_moe": "gate.weight",
    "olmo_hybrid": "A_log",
    "flint": "sinks",
}
CPU = torch.device("cpu")
BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``folder(name)``: a tiny model in fp32, of numbers that bf16 rounds."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            hf = tiny(name)
            with torch.no_grad():
                for tensor in hf.state_dict().values():
                    if tensor.is_floating_point():
                        tensor.add_(torch.rand(tensor.shape, generator=torch.Generator().manual_seed(1)) / 64)
            made[name] = tmp_path_factory.mktemp(name)
            hf.save_pretrained(made[name])
        return made[name]

    return make


def reference(path: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(path, dtype=BF16).state_dict())


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], part: str) -> None:
    kept = [name for name in wanted if name.endswith(part)]
    assert kept
    assert all(wanted[name].dtype == torch.float32 for name in kept), "transformers keeps them"
    assert sum(t.dtype == BF16 for t in wanted.values()) > len(kept)
    for name, tensor in found.items():
        assert tensor.dtype == wanted[name].dtype, name
        assert torch.equal(tensor, wanted[name]), name


def trained(
    strategy: Any, path: Path, world: DistributedContext
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], float]:
    """Weights as they are set up, and after a step; the gradients' norm."""
    engine = set_up(strategy, ModelFactory(Pretrained(name_or_path=str(path)), BF16, 0), world, "bf16-true")
    before = {name: t.clone() for name, t in engine.full_weights()}
    ids = torch.randint(5, 97, (2, 17), generator=torch.Generator().manual_seed(0))
    engine.backward(Batch(ids[:, :-1], ids[:, 1:], None, 32), tokens=32, last=True)
    norm = float(engine.step(1.0))
    state = engine.state_dict()["model"]
    after = {name: t.clone() for name, t in engine.full_weights()}
    assert {name: piece.tensor.dtype for name, piece in state.items()} == {n: t.dtype for n, t in after.items()}
    return before, after, norm


@pytest.mark.parametrize("name", KEPT)
def test_every_strategy_keeps_what_from_pretrained_keeps(name: str, folder: Any) -> None:
    path = folder(name)
    wanted = reference(path)
    before, alone, alone_norm = trained(Single(), path, DistributedContext())
    assert_equal(before, wanted, KEPT[name])
    with as_rank(0, 1) as world:
        ddp = set_up(Ddp(), ModelFactory(Pretrained(name_or_path=str(path)), BF16, 0), world, "bf16-true")
        assert_equal(dict(ddp.full_weights()), wanted, KEPT[name])
    for strategy in (Fsdp(), Fsdp(cpu_offload=True)):
        with as_rank(0, 1) as world:
            before, after, norm = trained(strategy, path, world)
        assert_equal(before, wanted, KEPT[name])
        assert norm == pytest.approx(alone_norm, rel=2e-2)
        for key, tensor in after.items():
            assert tensor.dtype == alone[key].dtype, key
            assert torch.allclose(tensor.float(), alone[key].float(), atol=3e-3), key


@pytest.mark.parametrize("name", KEPT)
def test_saving_in_bf16_rounds_no_more_than_loading_does(name: str, folder: Any, tmp_path: Path) -> None:
    path = folder(name)
    spec = Pretrained(name_or_path=str(path), save_dtype="bfloat16")
    model = spec.build(param_dtype=torch.float32, device=CPU, seed=0)
    dtypes = export.dtypes_for(model.hf, spec.save_dtype)
    own = export.weights_to_write(model.hf_state().items(), dtypes=dtypes, world=DistributedContext(), sharded=False)
    assert export.dtype_of(own) == BF16
    export.save_full(model.hf, own, tmp_path, shard_size="5GB")
    found = load_file(tmp_path / "model.safetensors")
    kept = [key for key in found if found[key].dtype == torch.float32]  # some have another name in files
    assert 0 < len(kept) < len(found) / 2
    exact = load_file(path / "model.safetensors")
    assert all(torch.equal(found[key], exact[key]) for key in kept)
    assert {found[key].dtype for key in found if key.endswith("o_proj.weight")} == {BF16}
    assert_equal(reference(tmp_path), reference(path), KEPT[name])


@pytest.mark.parametrize("name", ["deepseek_v3", "ernie4_5_moe", "olmo_hybrid"])
def test_random_weights_too(name: str) -> None:
    config = CONFIG_MAPPING[name](**tiny(name).config.to_dict()).to_dict()
    spec = Scratch(name_or_path=str(SAMPLE), overrides={"model_type": name} | config)
    built = spec.build(param_dtype=BF16, device=CPU, seed=0)
    found = {n: p.dtype for n, p in built.hf_named_parameters()}
    assert found == {n: p.dtype for n, p in spec.build_on_meta(param_dtype=BF16).hf_named_parameters()}
    assert set(found.values()) >= {BF16}
    if name != "deepseek_v3":
        assert {dtype for n, dtype in found.items() if n.endswith(KEPT[name])} == {torch.float32}
