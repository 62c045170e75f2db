"""The hooks of a run, and their state in its checkpoints."""

from __future__ import annotations

import json
from collections.abc import ItemsView, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pretrain.distributed.packing import name_of, pack, restore
from pretrain.distributed.sharding import TensorFiles
from pretrain.runtime.console import notice
from pretrain.runtime.errors import UserError

if TYPE_CHECKING:
    from pretrain.checkpoint.train_state import TrainState
    from pretrain.distributed.context import DistributedContext
    from pretrain.strategy.engine import Engine
    from pretrain.training.hook import Hook, Purpose


class Hooks:
    """The hooks of one rank, by name. A tensor ``key`` of a hook is saved as ``<hook>/<key>``."""

    def __init__(self, hooks: Mapping[str, Hook], world: DistributedContext) -> None:
        self._hooks = dict(hooks)
        self._world = world
        self._rank_local: set[str] = set()  # names of tensors that differ between ranks
        self._engine: Engine | None = None

    def items(self) -> ItemsView[str, Hook]:
        """Return the hooks with their names."""
        return self._hooks.items()

    def setup(self, engine: Engine) -> None:
        """Create the state of the hooks, unless that was done before."""
        if self._engine is engine:
            return
        self._engine = engine
        for hook in self._hooks.values():
            hook.setup(engine)
        _plain_values(self._states())  # a state that can't be saved ends the run before it trains

    def after_step(self, state: TrainState, engine: Engine) -> None:
        for hook in self._hooks.values():
            hook.after_step(state, engine)

    def averages(self, purpose: Purpose) -> dict[str, Mapping[str, Tensor]]:
        """Return the averages of the weights that hooks keep for ``purpose``, by name."""
        found: dict[str, Mapping[str, Tensor]] = {}
        for hook in self._hooks.values():
            found |= (
                hook.averages(purpose) if hasattr(hook, "averages") else {}
            )  # a trusted hook may lack the base class
        return found

    def added_to(self, engine_state: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Return as ``engine`` the state of the engine with the tensors of the hooks, and as ``hooks`` copies of the hooks' plain
        values. This is a collective.

        Raises ``UserError`` if JSON can't represent a value, or if ranks have different ones.
        """
        if not self._hooks:
            return {"engine": engine_state, "hooks": {}}
        states = self._states()
        values = self._equal_values(states)
        tensors = {f"{n}/{key}": t for n, state in states.items() for key, t in state.items() if isinstance(t, Tensor)}
        shards, manifest = pack(tensors, world=self._world, rank_local=self._rank_local)
        described = {"hook": shards, "tensors": engine_state["tensors"] | {"hook": manifest}}
        return {"engine": engine_state | described, "hooks": values}

    def _states(self) -> dict[str, dict[str, Any]]:
        """Return the state of each hook. This may be a collective, which gathers every weight."""
        return {name: hook.state_dict() for name, hook in self._hooks.items()}

    def _equal_values(self, states: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        every = self._world.all_gather_object(lambda: _plain_values(states))
        for values in every[1:]:
            if differing := sorted(name for name in every[0] if values[name] != every[0][name]):
                raise UserError(
                    f"hook {differing[0]}: the plain values of its state differ between ranks and can't be saved; a tensor "
                    "may differ"
                )
        return {name: json.loads(text) for name, text in every[0].items()}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore the hooks from the state of a checkpoint. A hook that the checkpoint does not have starts anew.

        Raises ``UserError`` if the tensors of a hook are not those that it saved.
        """
        files: TensorFiles = saved["engine"]["hook"]
        before = set(saved.get("hooks", {})) | {name_of(name).partition("/")[0] for name in sorted(files.keys())}
        for name in sorted(before ^ self._hooks.keys()):
            what = "its state in the checkpoint is not used" if name in before else "the checkpoint has no state of it"
            notice(f"hook {name}: {what}")
        for name, hook in self._hooks.items():
            if name not in before:
                assert self._engine is not None
                hook.setup(self._engine)  # again, because the weights are those of the checkpoint now
            else:
                current = hook.state_dict()
                tensors = {key: t.detach().clone() for key, t in current.items() if isinstance(t, Tensor)}
                prefixed = {f"{name}/{key}": tensor for key, tensor in tensors.items()}
                restore(files, like=prefixed, world=self._world, prefix=f"{name}/")
                hook.load_state_dict(saved["hooks"].get(name, {}) | tensors)


def _plain_values(states: Mapping[str, dict[str, Any]]) -> dict[str, str]:
    """Return the plain values of each hook's state as JSON, so that later changes of them are not saved."""
    found = {}
    for name, state in states.items():
        try:
            found[name] = json.dumps({key: value for key, value in state.items() if not isinstance(value, Tensor)})
        except (TypeError, ValueError) as error:
            raise UserError(
                f"hook {name}: its state can't be saved in a checkpoint: {error}; a state is flat: tensors and plain JSON "
                "values, no tensors inside of mappings or lists"
            ) from None
    return found
