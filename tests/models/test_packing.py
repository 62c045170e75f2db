"""What is told about a batch instead of looked for in it: the same numbers, and nothing is read from the device."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

from pretrain.data.batch import Batch
from pretrain.distributed.context import DistributedContext
from pretrain.models import packing
from pretrain.models.language_model import LanguageModel
from pretrain.models.transformers_internals import PACKING_CHECK
from pretrain.optim.adamw import AdamW
from pretrain.strategy.engine import Engine
from pretrain.strategy.precision import Precision
from pretrain.training.guard.config import GuardConfig
from pretrain.training.guard.spike_detector import FINE, SpikeDetector
from tests.models.tiny import tiny

PACKED = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7], list(range(12))])


class NothingIsRead(TorchDispatchMode):
    """Makes an error of what a GPU would have to be waited for, on a CPU too: ``item()``, ``bool()``, ``nonzero()``."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


def passed(model: LanguageModel, positions: torch.Tensor | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Loss and gradients."""
    ids = torch.randint(97, (2, 13), generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    loss = model(ids[:, :-1], ids[:, 1:], positions)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("positions", [None, PACKED], ids=["rows", "documents"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma2"])
def test_the_same_numbers_and_nothing_is_read(name: str, positions: torch.Tensor | None) -> None:
    model = LanguageModel(tiny(name))
    loss, gradients = passed(model, positions)
    with packing.known(packed=positions is not None), NothingIsRead():
        told, theirs = passed(model, positions)
    assert torch.equal(told, loss)
    assert all(torch.equal(a, b) for a, b in zip(gradients, theirs, strict=True))


def test_transformers_would_look() -> None:
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NothingIsRead():
        passed(LanguageModel(tiny("llama")), None)


def test_it_ends_with_an_error_too() -> None:
    before = vars(masking_utils)[PACKING_CHECK]
    with pytest.raises(KeyError), packing.known(packed=True):
        assert vars(masking_utils)[PACKING_CHECK] is not before
        raise KeyError
    assert vars(masking_utils)[PACKING_CHECK] is before


def test_threads_are_inside_together() -> None:
    """As the copies of DataParallel are; the first that leaves takes nothing from the other."""
    before, both, left = vars(masking_utils)[PACKING_CHECK], Barrier(2), Event()

    def second() -> None:
        with packing.known(packed=False):
            both.wait()
            left.wait()
            assert vars(masking_utils)[PACKING_CHECK](PACKED) is None

    with ThreadPoolExecutor() as pool:
        with packing.known(packed=False):
            other = pool.submit(second)
            both.wait()
        left.set()
        other.result()
    assert vars(masking_utils)[PACKING_CHECK] is before


@pytest.mark.parametrize("precision", [("32-true", "float32", "float32"), ("16-mixed", "float32", "float16")])
@pytest.mark.parametrize(
    ("name", "positions"), [("llama", None), ("llama", PACKED), ("opt", PACKED)], ids=["rows", "documents", "masks"]
)
def test_no_step_reads_anything(precision: tuple[str, str, str], name: str, positions: torch.Tensor | None) -> None:
    """Forward, backward, clipping, the guard's verdict and the update, as a GPU decides of it."""
    given, world = Precision(*precision, allow_cpu=True), DistributedContext()
    model = LanguageModel(tiny(name))
    engine = Engine(model, AdamW(lr=1e-2)(model.hf_named_parameters()), precision=given, world=world)
    engine.decides_on_device = True
    judge = SpikeDetector(GuardConfig(), device=world.device, scaled=engine.scaler.is_enabled())
    ids = torch.randint(97, (2, 13), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids[:, :-1], ids[:, 1:], positions, 24)

    def step() -> None:
        loss = sum(engine.backward(batch, tokens=48, last=last) for last in (False, True))
        zscore = judge.zscore(loss)
        norm = engine.step(1.0, refuse=lambda norm: judge.verdict(loss, zscore, norm) != FINE)
        judge.accept(loss, judge.verdict(loss, zscore, norm))

    step()  # the first makes the moments
    before = [p.detach().clone() for p in model.parameters()]
    with packing.known(packed=positions is not None), NothingIsRead():
        step()
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
