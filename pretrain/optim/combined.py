"""Several optimizers of one model, such as Muon for its matrices and AdamW for the rest, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pretrain.runtime.errors import UserError

BY_SCALER = ("grad_scale", "found_inf")  # attributes by which a loss scaler tells a fused optimizer what to skip


class CombinedOptimizer(Optimizer):
    """Updates the parameters of ``optimizers``, one after the other. Their parameter groups and states are shared, so that
    clipping, loss scaling, learning rates and checkpoints treat them as one optimizer.

    Raises ``ValueError`` if two of them have a parameter in common.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers = tuple(optimizers)
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})
        for optimizer in self.optimizers:
            self.state.update(optimizer.state)
            optimizer.state = self.state
        # A loss scaler leaves the decision to skip an update to optimizers that can make it on the device.
        self._step_supports_amp_scaling = all(
            getattr(optimizer, "_step_supports_amp_scaling", False) for optimizer in self.optimizers
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Run the step of every optimizer. Return the loss of ``closure`` when it is given."""
        loss = closure() if closure is not None else None
        flags: dict[str, Any] = {name: vars(self)[name] for name in BY_SCALER if name in vars(self)}
        for optimizer in self.optimizers:
            vars(optimizer).update(flags)
            optimizer.step()
            for name in flags:
                vars(optimizer).pop(name, None)
        return loss


def combined(made: Optimizer | Sequence[Optimizer]) -> Optimizer:
    """Return what an optimizer factory has made as one optimizer.

    Raises ``UserError`` if it has made none, or if a parameter belongs to two of them.
    """
    if not isinstance(made, Sequence):
        return made
    if not made:
        raise UserError("optimizer: its factory has returned no optimizer")
    if len(made) == 1:
        return made[0]
    try:
        return CombinedOptimizer(made)
    except ValueError as error:
        raise UserError(f"optimizer: a parameter belongs to one optimizer: {error}") from None


def check_every_parameter(optimizer: Optimizer, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Raise ``UserError`` if ``optimizer`` leaves out a parameter that is not frozen: its gradient would grow, because nothing
    clears it, and count in the norm by which all are clipped."""
    updated = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    left_out = [name for name, p in named_parameters if p.requires_grad and id(p) not in updated]
    if left_out:
        raise UserError(
            f"optimizer: no group has {left_out[0]}{f' and {len(left_out) - 1} more' if len(left_out) > 1 else ''}; give every "
            "parameter that is trained to one optimizer, or freeze it in a transform"
        )


def state_tensors(state: Mapping[str, Any]) -> Iterator[Tensor]:
    """Yield the tensors in the state of a parameter, those in nested dicts included."""
    for value in state.values():
        if isinstance(value, Mapping):
            yield from state_tensors(value)
        elif isinstance(value, Tensor):
            yield value
