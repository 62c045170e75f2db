"""Communication hooks of DDP. torch reads their annotations, which therefore are types here and not strings."""

import torch
import torch.distributed as dist


def average_in_bf16(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Average a bucket of gradients over all ranks in bf16. torch's own hook (``bf16_compress_hook``) needs NCCL. Each rank
    divides before the sum, so that the sum stays in range."""
    gradients = bucket.buffer()
    rounded = gradients.to(torch.bfloat16).div_(dist.get_world_size())
    work = dist.all_reduce(rounded, async_op=True)
    assert work is not None

    def restore(_: torch.futures.Future[torch.Tensor]) -> torch.Tensor:
        return gradients.copy_(rounded)

    return work.get_future().then(restore)
