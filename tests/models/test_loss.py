"""The loss in chunks against the plain cross entropy in fp64: its value, and the gradients of states, weight and bias."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.data.batch import IGNORE
from pretrain.models import loss as module
from pretrain.models.loss import chunk_rows, linear_cross_entropy

ROWS, WIDTH, WORDS = 37, 16, 53


def inputs(
    *, bias: bool = True, scale: float = 1.0, words: int = WORDS
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    draw = torch.Generator().manual_seed(0)
    randn = partial(torch.randn, generator=draw)
    labels = torch.randint(0, words, (ROWS,), generator=draw)
    labels[[0, 8, 9, 36]] = torch.tensor([0, words - 1, IGNORE, IGNORE])
    return randn(ROWS, WIDTH), randn(words, WIDTH) * scale, randn(words) if bias else None, labels


def leaves(*tensors: Tensor | None, dtype: torch.dtype) -> list[Tensor | None]:
    return [None if t is None else t.detach().to(dtype).requires_grad_() for t in tensors]


def exact(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> tuple[float, list[Tensor | None]]:
    """The loss and the gradients of its three inputs, in fp64."""
    given = leaves(hidden, weight, bias, dtype=torch.float64)
    value = F.cross_entropy(F.linear(*given), labels, ignore_index=IGNORE, reduction="sum")  # type: ignore[arg-type]
    value.backward()
    return value.item(), [None if t is None else t.grad for t in given]


def off(ours: Tensor | None, theirs: Tensor | None) -> float:
    assert ours is not None
    assert theirs is not None
    return float((ours.double() - theirs).norm() / theirs.norm())


@pytest.fixture(params=["one chunk", "chunks", "traced"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """``traced``: in chunks, as the compiler gets them."""
    if request.param != "one chunk":
        monkeypatch.setattr(module, "CHUNK_LOGITS", 8 * WORDS)
        assert chunk_rows(ROWS, WORDS) == 8, "five chunks, the last of five rows"
    traced = request.param == "traced"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: traced)
    monkeypatch.setattr(module, "_eager_chunk" if traced else "_traced_chunk", None)  # the other one is not called
    return str(request.param)


@pytest.mark.parametrize("bias", [True, False])
def test_value_and_gradients(bias: bool, chunks: str) -> None:
    want, want_grads = exact(*inputs(bias=bias))
    *tensors, labels = inputs(bias=bias)
    given = leaves(*tensors, dtype=torch.float32)
    value = linear_cross_entropy(*given, labels)  # type: ignore[arg-type]
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(want, rel=1e-6)
    (value * 3).backward()
    for ours, theirs in zip(given, want_grads, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert off(ours.grad, 3 * theirs) < 1e-6
    assert given[0].grad[[9, 36]].count_nonzero() == 0, "rows without a target"  # type: ignore[union-attr, index]


@pytest.mark.parametrize("bias", [True, False])
def test_weights_of_rows(bias: bool, chunks: str) -> None:
    """Against fp64; a row of weight 0 has no gradient, and weights of 1 change no bit."""
    *tensors, labels = inputs(bias=bias)
    weights = torch.rand(ROWS, generator=torch.Generator().manual_seed(1)) * 3
    weights[[1, 20]] = 0
    wanted = leaves(*tensors, dtype=torch.float64)
    logits = F.linear(*wanted)  # type: ignore[arg-type]
    value = (F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none") * weights).sum()
    value.backward()
    given = leaves(*tensors, dtype=torch.float32)
    found = linear_cross_entropy(*given, labels, weights)  # type: ignore[arg-type]
    assert found.item() == pytest.approx(value.item(), rel=1e-6)
    found.backward()
    for ours, theirs in zip(given, wanted, strict=True):
        if ours is not None:
            assert off(ours.grad, theirs.grad) < 1e-6  # type: ignore[union-attr, arg-type]
    assert given[0].grad[[1, 9, 20, 36]].count_nonzero() == 0  # type: ignore[union-attr, index]
    for ones in (None, torch.ones(ROWS)):
        again = leaves(*tensors, dtype=torch.float32)
        linear_cross_entropy(*again, labels, ones).backward()  # type: ignore[arg-type]
        if ones is None:
            plain = again
    for ours, theirs in zip(again, plain, strict=True):
        assert ours is None or torch.equal(ours.grad, theirs.grad)  # type: ignore[arg-type, union-attr]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1.5e-3), (torch.bfloat16, 1e-2)])
def test_16_bits(dtype: torch.dtype, tolerance: float, chunks: str) -> None:
    """Products in 16 bits, the sum over chunks in fp32; the value is that of logits in 16 bits, with a gradient or without."""
    hidden, weight, bias, labels = inputs()
    given = leaves(hidden, weight, bias, dtype=torch.float32)
    _, want = exact(hidden, weight, bias, labels)
    assert bias is not None
    logits = F.linear(hidden.to(dtype), weight.to(dtype)).float() + bias
    rounded = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum").item()
    with torch.autocast("cpu", dtype):
        value = linear_cross_entropy(*given, labels)  # type: ignore[arg-type]
        with torch.no_grad():
            alone = linear_cross_entropy(hidden, weight, bias, labels)
    assert value.item() == alone.item() == pytest.approx(rounded, rel=1e-6)
    assert value.item() != pytest.approx(exact(hidden, weight, bias, labels)[0], rel=1e-6)
    value.backward()
    for ours, theirs in zip(given, want, strict=True):
        assert ours is not None
        assert off(ours.grad, theirs) < tolerance


def test_fp16_keeps_what_is_smaller_than_its_normal_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of words with a probability of 1e-6 keep 10 bits; without room about 4 would be left."""
    monkeypatch.setattr(module, "CHUNK_LOGITS", 8 * 4096)
    hidden, weight, bias, labels = inputs(words=4096, scale=0.1)
    assert bias is not None
    hidden, labels, bias = hidden[:16], labels[:16] % 8, torch.where(torch.arange(4096) < 8, 0.0, -11.0)
    _, want = exact(hidden, weight, bias, labels)
    given = leaves(hidden, weight, bias, dtype=torch.float32)
    with torch.autocast("cpu", torch.float16):
        linear_cross_entropy(*given, labels).backward()  # type: ignore[arg-type]
    p = torch.softmax(hidden.double() @ weight.double().T + bias, 1)
    assert 1e-7 < p[:, 8:].min() < p[:, 8:].max() < 2e-5
    assert given[1] is not None
    assert want[1] is not None
    assert off(given[1].grad[8:], want[1][8:]) < 3e-3  # type: ignore[index]


def test_the_scale_of_a_loss_may_be_more_than_fp16_holds() -> None:
    hidden, weight, _, labels = inputs(bias=False, scale=1e-3)
    _, want = exact(0.01 * hidden, weight, None, labels)
    given = leaves(0.01 * hidden, weight, dtype=torch.float16)
    scale = 1e5  # fp16 ends at 65,504
    (linear_cross_entropy(*given, None, labels) * scale).backward()  # type: ignore[arg-type]
    for ours, theirs in zip(given, want[:2], strict=True):
        assert ours is not None
        assert theirs is not None
        assert off(ours.grad, theirs * scale) < 2e-2


def test_weights_in_bf16_have_gradients_in_bf16(chunks: str) -> None:
    *tensors, labels = inputs()
    given = leaves(*tensors, dtype=torch.bfloat16)
    _, want = exact(*[None if t is None else t.detach() for t in given], labels)  # type: ignore[arg-type]
    (linear_cross_entropy(*given, labels) * 2).backward()  # type: ignore[arg-type]
    for ours, theirs in zip(given, want, strict=True):
        assert ours is not None
        assert ours.grad is not None
        assert ours.grad.dtype == torch.bfloat16
        assert off(ours.grad, 2 * theirs) < 1e-2


@pytest.mark.parametrize("frozen", range(3))
def test_what_is_frozen_has_no_gradient(frozen: int) -> None:
    *tensors, labels = inputs()
    _, want = exact(*inputs())
    given = leaves(*tensors, dtype=torch.float32)
    assert given[frozen] is not None
    given[frozen].requires_grad_(False)  # type: ignore[union-attr]
    linear_cross_entropy(*given, labels).backward()  # type: ignore[arg-type]
    for index, (ours, theirs) in enumerate(zip(given, want, strict=True)):
        assert ours is not None
        assert (ours.grad is None) == (index == frozen)
        if index != frozen:
            assert off(ours.grad, theirs) < 1e-6


def test_the_logits_of_a_chunk_are_its_gradients_memory() -> None:
    """What the peak of memory depends on."""
    logits = torch.randn(8, 5)
    _, grad, _ = module._eager_chunk(logits, torch.arange(8) % 5)
    assert grad.data_ptr() == logits.data_ptr()


@pytest.mark.parametrize(
    ("rows", "words", "expected"),
    [(1, 1, 8), (100, 50_000, 104), (1000, 2**25, 8), (4096, 2**15, 1024), (4100, 2**15, 1032), (2**14, 2**12, 2**13)],
)
def test_rows_of_a_chunk(rows: int, words: int, expected: int) -> None:
    """Near 2^25 logits in each of equal chunks, rounded up to eight rows."""
    assert chunk_rows(rows, words) == expected
