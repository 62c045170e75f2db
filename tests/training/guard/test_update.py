"""An update that is refused leaves weights and moments as they are, whether host or device decides; one that is not
refused is the same to the last bit."""

import copy

import pytest
import torch

from pretrain.data.batch import Batch
from pretrain.distributed.context import DistributedContext
from pretrain.models.language_model import LanguageModel
from pretrain.optim.adamw import AdamW
from pretrain.strategy.engine import Engine
from pretrain.strategy.precision import Precision
from tests.models.tiny import tiny

REFUSED = (False, True, False, True, True, False)


def engine_of(precision: str, weights: str, compute: str, *, on_device: bool) -> Engine:
    """``on_device``: what a GPU does; torch's fused AdamW on a CPU heeds ``found_inf`` as well."""
    given = Precision(precision, weights, compute, allow_cpu=True)
    model = LanguageModel(tiny("llama").to(given.param_dtype))
    world = DistributedContext()
    engine = Engine(model, AdamW(lr=1e-2)(model.hf_named_parameters()), precision=given, world=world)
    engine.decides_on_device = on_device
    if engine.scaler.is_enabled():
        engine.scaler.load_state_dict(engine.scaler.state_dict() | {"scale": 1024.0})
    return engine


def state(engine: Engine) -> dict[str, torch.Tensor]:
    found = engine.state_dict()
    return {f"{kind}/{name}": p.tensor for kind in ("model", "optimizer") for name, p in found[kind].items()}


def step(engine: Engine, number: int, *, refused: bool) -> None:
    ids = torch.randint(97, (2, 17), generator=torch.Generator().manual_seed(number))
    engine.backward(Batch(ids[:, :-1], ids[:, 1:], None, 32), tokens=32, last=True)
    engine.step(1.0, refuse=lambda norm: torch.tensor(refused))


@pytest.mark.parametrize(
    "precision",
    [
        ("32-true", "float32", "float32"),
        ("bf16-true", "bfloat16", "bfloat16"),
        ("16-mixed", "float32", "float16"),
    ],
    ids=lambda p: p[0],
)
def test_host_and_device_decide_alike(precision):
    by_host, by_device = (engine_of(*precision, on_device=on_device) for on_device in (False, True))
    for number, refused in enumerate(REFUSED):
        before = copy.deepcopy(state(by_device))
        for engine in (by_host, by_device):
            step(engine, number, refused=refused)
        after, expected = state(by_device), state(by_host)
        assert after.keys() == expected.keys()
        assert all(torch.equal(after[name], expected[name]) for name in after)
        assert any(not torch.equal(after[name], before[name]) for name in before) == (not refused) or not number
        assert not hasattr(by_device.optimizer, "found_inf"), "the next step must not find it"
    assert int(by_host.skipped) == int(by_device.skipped) == sum(REFUSED)


def test_an_infinite_gradient_that_the_scaler_finds_is_left_out_once():
    """Both refuse: fused kernels know 1 and nothing else, so the two must not be added up."""
    engine = engine_of("16-mixed", "float32", "float16", on_device=True)
    step(engine, 0, refused=False)
    before = copy.deepcopy(state(engine))
    next(engine.model.parameters()).register_hook(lambda gradient: gradient * float("inf"))
    step(engine, 1, refused=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(engine).items())
    assert int(engine.skipped) == 1


def test_of_parameters_on_the_host_the_host_decides():
    """As FSDP's cpu_offload leaves them on a GPU; any device that is not theirs will do."""
    given = Precision("32-true", "float32", "float32")
    model = LanguageModel(tiny("llama"))
    world = DistributedContext(device=torch.device("meta"))
    assert not Engine(
        model, AdamW(lr=1e-2)(model.hf_named_parameters()), precision=given, world=world
    ).decides_on_device
    model.to("meta")
    assert Engine(model, AdamW(lr=1e-2)(model.hf_named_parameters()), precision=given, world=world).decides_on_device
