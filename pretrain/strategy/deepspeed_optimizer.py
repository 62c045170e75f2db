"""The optimizers of DeepSpeed's stages 1 to 3. Their state is sharded together with the flattened parameters, so it must have a
parameter's shape or be a step counter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from torch.nn import Parameter
from torch.optim import Optimizer

from pretrain.distributed.packing import name_of
from pretrain.distributed.sharding import TensorFiles, check_shape
from pretrain.models.language_model import LanguageModel
from pretrain.optim.combined import combined
from pretrain.runtime.errors import UserError
from pretrain.strategy.optimizer_state import check_parameters

# DeepSpeed creates Adagrad again after it has flattened the parameters; the engine would hold the first one.
SUPPORTED = tuple(kind for kind in ZERO_SUPPORTED_OPTIMIZERS if "Adagrad" not in kind.__name__)


def supported(made: Optimizer | Sequence[Optimizer], stage: int) -> Optimizer:
    """Return the optimizer that a factory has made. Raises ``UserError`` if DeepSpeed's ``stage`` can't shard it."""
    optimizer = combined(made)
    if type(optimizer) not in SUPPORTED:
        name = type(optimizer).__name__
        raise UserError(
            f"optimizer: DeepSpeed's stage {stage} flattens the parameters, which {name} can't update; use "
            "strategy.zero_stage=0, strategy=fsdp, or one of "
            f"{', '.join(sorted({kind.__name__ for kind in SUPPORTED}))}"
        )
    return optimizer


def split_by_thaw(
    optimizer: Optimizer, named_parameters: Iterable[tuple[str, Parameter]], thaw_at: Mapping[str, float]
) -> None:
    """Split the groups of ``optimizer``, in place, so that all parameters of a group, which share flat shards, stop being frozen
    at the same share of the run. It is the group's ``thaw_at``, which other groups do not have."""
    values = {id(p): thaw_at.get(name) for name, p in named_parameters}
    groups = []
    for group in optimizer.param_groups:
        parts: dict[float | None, list[Parameter]] = {}
        for parameter in group["params"]:
            parts.setdefault(values.get(id(parameter)), []).append(parameter)
        for until, members in parts.items():
            groups.append({**group, "params": members} | ({} if until is None else {"thaw_at": until}))
    optimizer.param_groups[:] = groups


def check_moments(state: dict[str, Any], model: LanguageModel) -> None:
    """Raise ``UserError`` if the optimizer state of a checkpoint, ``state``, does not fit the parameters of ``model``."""
    files: TensorFiles = state["optimizer"]
    trained = {name: p for name, p in model.hf_named_parameters() if p.requires_grad}
    slots = {*files.keys(), *(state.get("optimizer_values") or {}).get("state", {})}
    check_parameters(set(map(name_of, slots)), set(trained), complete=state.get("tensors") is not None)
    for slot in sorted(slots):
        if slot not in files.keys() or name_of(slot) != slot:  # noqa: SIM118 (not a dict)
            raise UserError(
                f"optimizer state {slot}: DeepSpeed's stages 1 to 3 keep tensors of the parameters' shapes alone; resume with "
                "the strategy of before"
            )
        parameter = trained[slot.partition("/")[0]]
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        check_shape(slot, files, () if slot.endswith("/step") else shape)
