"""What DDP's options do, seen from its communication hook."""

import pytest
import torch
import torch.distributed as dist

from pretrain.strategy.ddp import Ddp
from tests.strategy.ranks import as_rank, set_up


@pytest.mark.parametrize("view", [True, False])
def test_gradients_travel_with_the_last_micro_batch_alone(view, factory, batch):
    """And lie where they travel from, or in memory of their own."""
    with as_rank(0, 2) as world:
        engine = set_up(Ddp(gradient_as_bucket_view=view), factory("llama-tied"), world)
        buckets = set()

        def hook(state, bucket):
            buckets.add(bucket.buffer().untyped_storage().data_ptr())
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        engine.step_module.register_comm_hook(None, hook)
        for _ in range(2):
            engine.backward(batch, tokens=96, last=False)
        assert not buckets
        engine.backward(batch, tokens=96, last=True)
        assert buckets
        gradients = {p.grad.untyped_storage().data_ptr() for p in engine.model.parameters()}
        assert (gradients == buckets) is view


def test_gradients_are_exchanged_in_bf16(factory, batch, monkeypatch):
    """Nobody else is there, so the sum over the two ranks is this one's half."""
    sent, real = [], dist.all_reduce

    def note(tensor, *args, **options):
        sent.append(tensor.dtype)
        return real(tensor, *args, **options)

    def exact(state, bucket):
        future = torch.futures.Future()
        future.set_result(bucket.buffer() / 2)
        return future

    gradients = {}
    for dtype in ("float32", "bfloat16"):
        with as_rank(0, 2) as world:
            engine = set_up(Ddp(reduce_dtype=dtype), factory("llama-tied"), world)
            if dtype == "float32":
                engine.step_module.register_comm_hook(None, exact)
            with monkeypatch.context() as patch:
                patch.setattr(dist, "all_reduce", note)
                engine.backward(batch, tokens=96, last=True)
            gradients[dtype] = [p.grad.clone() for p in engine.model.parameters()]
    assert set(sent) == {torch.bfloat16}
    for rounded, expected in zip(gradients["bfloat16"], gradients["float32"], strict=True):
        assert rounded.dtype == torch.float32
        assert torch.equal(rounded, expected.to(torch.bfloat16).float())
