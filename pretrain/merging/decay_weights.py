"""WSM: averages of a run's last checkpoints that stand for a decay of the learning rate.

Source: Tian et al. 2025, WSM: Decay-Free Learning Rate Schedule via Checkpoint Merging (arXiv:2507.17634). Between checkpoints
θ_0 … θ_k of a constant learning rate lie k updates g_1 … g_k. The merged model Σ c_j θ_j is θ_0 plus the updates, and the i-th of
them counts w_i = c_i + … + c_k. So updates that are to be scaled by the decreasing w_1 ≥ … ≥ w_k need the weights c_0 = 1 - w_1,
c_j = w_j - w_{j+1} and c_k = w_k.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from pretrain.optim.schedule import Shape, fallen


def weights_of(scales: Sequence[float]) -> list[float]:
    """Return the weights c_0 … c_k of the checkpoints, oldest first, for the ``scales`` w_1 … w_k of the updates between them."""
    return [after - before for after, before in pairwise([1.0, *scales, 0.0])]


def decay_weights(steps: Sequence[int], decay: Shape) -> list[float]:
    """Return the weights of the checkpoints of ``steps`` (ascending, at least one) that stand for ``decay``.

    The decay starts at the first checkpoint and would reach 0 one interval behind the last one, so that every checkpoint has a
    weight above 0. With equal intervals, ``linear`` gives equal weights.
    """
    count = len(steps) - 1
    if not count:
        return [1.0]
    span = (steps[-1] - steps[0]) * (count + 1) / count
    return weights_of([1 - fallen(decay, (step - steps[0]) / span) for step in steps[1:]])
