"""Classes of torch.optim that can't train a run, refused before it starts (seen in torch 2.13)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pretrain.runtime.errors import UserError

if TYPE_CHECKING:
    from torch.optim import Optimizer

UNUSABLE = {
    "LBFGS": "evaluates the loss several times in an update, and a run gives it gradients only",
    "SparseAdam": "updates with sparse gradients only, and those of a language model are dense",
}
NOT_SHARDED = {  # in-place operations that DTensor does not support
    "Adafactor": "optimizer=adafactor can, and so can strategy=single and strategy=ddp",
    "Rprop": "strategy=single and strategy=ddp can",
}


def check_usable(optimizers: Optimizer | Sequence[Optimizer]) -> None:
    """Raise ``UserError`` for an optimizer of torch that can't update its parameters as the strategy has placed them."""
    from torch.distributed.tensor import DTensor

    for optimizer in optimizers if isinstance(optimizers, Sequence) else [optimizers]:
        kind = type(optimizer)
        if not f"{kind.__module__}.".startswith("torch.optim."):
            continue
        name = f"torch.optim.{kind.__name__}"
        if kind.__name__ in UNUSABLE:
            raise UserError(f"optimizer: {name} {UNUSABLE[kind.__name__]}; choose another one")
        is_sharded = any(isinstance(p, DTensor) for group in optimizer.param_groups for p in group["params"])
        if is_sharded and kind.__name__ in NOT_SHARDED:
            raise UserError(
                f"optimizer: {name} can't update parameters that are sharded as DTensors; {NOT_SHARDED[kind.__name__]}"
            )
