"""Which kernels attention may use. On a CPU nothing is chosen; `tests/test_gpu.py` has what a GPU takes."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from pretrain.models import attention
from pretrain.models.attention import Shape
from tests.models.tiny import tiny

CPU = torch.device("cpu")
SHAPE = Shape(8, torch.float32, 0.0)


def test_a_shape_is_read_from_the_config() -> None:
    assert Shape.of(tiny("llama"), torch.bfloat16) == Shape(8, torch.bfloat16, 0.0)
    assert Shape.of(tiny("qwen3", head_dim=16), torch.float32) == Shape(16, torch.float32, 0.0)
    assert Shape.of(tiny("gpt2", attn_pdrop=0.1), torch.float16) == Shape(8, torch.float16, 0.1)


def test_a_kernel_works_or_not() -> None:
    assert attention.works(SDPBackend.MATH, SHAPE, CPU)
    assert attention.works(SDPBackend.FLASH_ATTENTION, SHAPE, CPU)
    assert not attention.works(SDPBackend.CUDNN_ATTENTION, SHAPE, CPU)


def test_the_order_stays_for_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention import _cur_sdpa_kernel_backends as current

    before = current(with_priority=True)
    with attention._stack.__class__() as stack:
        monkeypatch.setattr(attention, "_stack", stack)
        attention.prefer_fast_kernels.__wrapped__(SHAPE, CPU)
        assert [kernel.name for kernel in current(with_priority=True)] == list(attention.ORDER)
        with sdpa_kernel(SDPBackend.MATH):
            pass
        assert [kernel.name for kernel in current(with_priority=True)] == list(attention.ORDER)
    assert current(with_priority=True) == before


def test_what_was_taken_is_named() -> None:
    assert attention.describe(tiny("llama"), torch.float32, CPU) == "sdpa"
    assert attention.describe(tiny("gemma2"), torch.float32, CPU) == "eager"
