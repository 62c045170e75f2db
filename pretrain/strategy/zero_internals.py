"""What this program uses of the flat shards of ZeRO's optimizers beyond DeepSpeed's documentation (seen in 0.19.8): which shard
holds a weight, and where its weight and gradient are. ``tests/test_internals.py`` fails when one of these has changed."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class ZeroShards:
    """The flat fp32 shards inside of DeepSpeed's engine ``wrapped``, of stage 1, 2 or 3."""

    def __init__(self, wrapped: Any) -> None:
        self._zero = wrapped.optimizer
        self._stage = int(wrapped.zero_optimization_stage())

    def shard_of(self, parameter: Any) -> Tensor:
        """Return the flat fp32 tensor that holds this rank's part of ``parameter``, if there is one."""
        if self._stage == 3:
            place = self._zero.grad_position[self._zero.get_param_id(parameter)][0]
            shard: Tensor = self._zero.fp32_partitioned_groups_flat[place]
            return shard
        groups = self._zero.bit16_groups
        place = next(i for i, group in enumerate(groups) if any(parameter is one for one in group))
        return list(self._zero.single_partition_of_fp32_groups)[place]

    def weight_part(self, parameter: Any) -> Tensor | None:
        """Return this rank's part of the fp32 weight of ``parameter``, 1-d, sharing the memory of the flat shard; ``None``
        without a part."""
        if self._stage == 3:
            part: Tensor = self._zero._get_fp32_opt_state_partition(parameter, release_swap_buffers=True)[0]
            return part.detach()
        mapping = parameter._hp_mapping
        return None if mapping is None else mapping.hp_fragment.detach()

    def gradient_part(self, parameter: Any) -> Tensor | None:
        """Return the gradient of `weight_part` after the last backward of a step, sharing its memory; ``None`` without a part."""
        if self._stage == 3:
            part: Tensor = self._zero._get_fp32_grad_state_partition(parameter, release_swap_buffers=True)[0]
            return part.detach()
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        gradient = mapping.get_lp_grad_fragment(parameter._index_in_param_group).detach().view(-1)
        place = mapping.lp_fragment_address
        return gradient if gradient.numel() == place.numel else gradient.narrow(0, place.start, place.numel)

    def own_range(self, parameter: Any) -> tuple[int, int]:
        """Return the first element of the flattened ``parameter`` that is in this rank's shard, and the one after the last."""
        if self._stage == 3:
            size = parameter.ds_tensor.numel()
            first = dist.get_rank(parameter.ds_process_group) * size
            return min(first, parameter.ds_numel), min(first + size, parameter.ds_numel)
        if parameter._hp_mapping is None:  # all of it is in the shards of other ranks
            return 0, 0
        address = parameter._hp_mapping.lp_fragment_address
        return address.start, address.start + address.numel

    def note_gradient(self, parameter: Any, gradient: Tensor) -> None:
        """Renew what DeepSpeed has computed of ``gradient``, the `gradient_part` of ``parameter``, which was changed in place:
        with an optimizer on the host it takes the norms of gradients before the step."""
        norms = getattr(self._zero, "norm_for_param_grads", {})
        known = self._zero.get_param_id(parameter) if norms else None
        if known in norms:
            norms[known] = torch.linalg.vector_norm(gradient.to(norms[known].dtype)).to(norms[known].device)
