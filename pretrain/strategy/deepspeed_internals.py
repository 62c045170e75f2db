"""What this program uses of DeepSpeed beyond its documentation (seen in 0.19.8).
``tests/test_internals.py`` fails when one of these has changed.

- the ZeRO optimizer: its norm, how it renews the 16-bit weights, and its loss scaler
- two of its functions are replaced, of which one compiles C++ at the first use and the other imports torch's compiler
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import deepspeed
import torch


def disable_compilation() -> None:
    """Disable DeepSpeed's own CPU communication, because it compiles C++ for a minute at its first use and is only needed for
    inference, and its compiled kernels for Muon, because no run here uses them and decorating them takes a second."""
    communication = vars(import_module("deepspeed.comm.torch"))
    assert "build_shm_op" in communication, f"DeepSpeed {deepspeed.__version__} builds its CPU communication elsewhere"
    communication["build_shm_op"] = lambda: None
    vars(import_module("deepspeed.runtime.compiler"))["compile"] = lambda: lambda function: function


class ZeroOptimizer:
    """The ZeRO optimizer inside of DeepSpeed's engine ``wrapped``, of stage 1, 2 or 3."""

    def __init__(self, wrapped: Any) -> None:
        self._zero = wrapped.optimizer
        self.stage = int(wrapped.zero_optimization_stage())

    @property
    def skipped(self) -> bool:
        """Whether the last step was skipped, because its norm was not finite."""
        return bool(self._zero.overflow)

    @property
    def grad_norm(self) -> Any:
        """The norm of the last step's gradients before clipping, a number or a tensor."""
        return self._zero._global_grad_norm

    @contextmanager
    def infinite_norm(self, device: torch.device) -> Iterator[None]:
        """Make the norm of a step infinite, so that DeepSpeed skips the step and clears its gradients."""
        measure = "scaled_global_norm" if self.stage < 3 else "_get_norm_groups"
        infinite = torch.tensor(float("inf"), device=device)
        setattr(self._zero, measure, lambda: infinite if self.stage < 3 else [infinite])
        try:
            yield
        finally:
            delattr(self._zero, measure)

    def link_moments(self) -> None:
        """Give parameters their views of the moments in the shards, where moments exist. DeepSpeed does this only once, when
        the first parameter group has been updated and the others have no moments yet."""
        if self.stage < 3:
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def update_weights(self) -> None:
        """Renew the weights of the model from the fp32 ones, as DeepSpeed does at the end of a step."""
        if self.stage < 3:
            self._zero.update_lp_params()
            return
        self._zero._partition_all_parameters()
        for i in range(len(self._zero.fp16_groups)):
            self._zero._reassign_or_swap_out_partitioned_parameters(i)
        self._zero._post_step(set())

    @property
    def loss_scale(self) -> float:
        """The factor by which the loss is multiplied."""
        return float(self._zero.loss_scaler.cur_scale)

    def loss_scale_state(self) -> dict[str, float]:
        """Return the state of the dynamic loss scale with the key names of torch's ``GradScaler``; empty for a fixed scale."""
        scaler = self._zero.loss_scaler
        if not scaler.dynamic:
            return {}
        return {
            "scale": float(scaler.cur_scale),
            "growth_factor": scaler.scale_factor,
            "backoff_factor": 1 / scaler.scale_factor,
            "growth_interval": scaler.scale_window,
            "_growth_tracker": (scaler.cur_iter - scaler.last_overflow_iter - 1) % scaler.scale_window,
        }

    def load_loss_scale(self, state: dict[str, float]) -> None:
        """Restore a state of `loss_scale_state`."""
        scaler = self._zero.loss_scaler
        if "scale" in state and scaler.dynamic:
            scaler.cur_scale = state["scale"]
            scaler.cur_iter = int(state["_growth_tracker"])
            scaler.last_overflow_iter = -1
