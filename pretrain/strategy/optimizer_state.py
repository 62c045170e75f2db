"""The state of an optimizer of any class as named tensors and plain values, saved by its own shapes and sharding.

The names are ``<parameter>/<key>``; where an optimizer nests dicts, ``<parameter>/<key>/<key>``. What can be saved is what
torch's own ``Optimizer.state_dict`` holds: ``optimizer.state`` by parameter, and the values in ``optimizer.param_groups`` that
training has changed.

Which tensors an optimizer keeps, and how they are sharded, only its first update shows. Therefore a new optimizer is first
updated with gradients of zero, and the saved values are then copied into the tensors that this update has made. The weights
that it changes must be loaded afterwards. `torch.distributed.checkpoint.state_dict` does the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pretrain.distributed import sharding
from pretrain.distributed.packing import AS_BEFORE, check_shapes, pack, saved_names
from pretrain.distributed.sharding import Manifest, TensorFiles, TensorShard, fill
from pretrain.runtime.errors import UserError

if TYPE_CHECKING:
    from pretrain.distributed.context import DistributedContext
    from pretrain.models.language_model import LanguageModel

UNSAVED = (
    "params",
    "param_names",
    "lr",
    "initial_lr",
    "lr_factor",
    "schedule",
)  # of a parameter group: what a run sets by itself
Slot = tuple[str, nn.Parameter, dict[Any, Any], Any]  # name, parameter, and the dict and key where the value is


class OptimizerState:
    """Saves and restores the state of ``optimizer``. It must be created before the first update."""

    def __init__(self, model: LanguageModel, optimizer: torch.optim.Optimizer, world: DistributedContext) -> None:
        self.model = model
        self.optimizer = optimizer
        self.world = world
        self._starts_empty = not optimizer.state
        self._initial_groups = [_snapshot(group) for group in optimizer.param_groups]
        self._rank_local: set[str] = set()

    # -- saving -------------------------------------------------------------------------------------------------------

    def pack(self, owners: dict[str, int]) -> tuple[dict[str, TensorShard], Manifest, dict[str, Any]]:
        """Return this rank's shards, dtype and full shape of every tensor that any rank writes, and the plain values, as
        ``{"state": {name: value}, "groups": [{key: value}]}``; if tensors belong to their ranks, also ``layout``, a digest
        of each rank's shards. ``owners`` receives the rank that writes each tensor that all ranks hold, if the ranks share
        them. This is a collective.

        Raises ``UserError`` on every rank for a state that can't be saved.
        """
        values = self._values()
        slots = [(name, p, found[key]) for name, p, found, key in self._slots() if isinstance(found[key], Tensor)]
        replicas = {name for name, parameter, _ in slots if _is_replica(name, parameter)}
        named = {name: tensor for name, _, tensor in slots}
        shards, manifest = pack(named, world=self.world, replicas=replicas, rank_local=self._rank_local, owners=owners)
        if self._rank_local:
            values["layout"] = self.world.all_gather_object(self._layout)
        return shards, manifest, values

    def replicated(self) -> Iterator[tuple[str, Tensor]]:
        """Yield by name the tensors that other ranks hold as well, with the same bits."""
        for name, parameter, found, key in self._slots():
            value = found[key]
            if isinstance(value, DTensor):
                if sharding.is_replicated(value):
                    yield name, value
            elif isinstance(value, Tensor) and name not in self._rank_local and _is_replica(name, parameter):
                yield name, value

    def _layout(self) -> str:
        """Return a digest of which rows of the parameters this rank holds."""
        parameters = self.model.hf_named_parameters()
        rows = [(name, sharding.start_of(p), tuple(sharding.local(p).shape)) for name, p in parameters]
        return xxhash.xxh3_128_hexdigest(repr(rows).encode())

    def _slots(self) -> Iterator[Slot]:
        for name, parameter in self.model.hf_named_parameters():
            for slot, found, key in _places(name, self.optimizer.state.get(parameter, {})):
                yield slot, parameter, found, key

    def _values(self) -> dict[str, Any]:
        """Return the plain values. This is a collective. Raises ``UserError`` if JSON can't represent one, if ranks have
        different ones, or if the optimizer keeps state for other things than the model's parameters."""

        def collect() -> dict[str, Any]:
            known = {id(parameter) for _, parameter in self.model.hf_named_parameters()}
            for name, parameter in self.model.hf_named_parameters():
                _check_keys(name, self.optimizer.state.get(parameter, {}))
            for key, value in self.optimizer.state.items():
                if value and id(key) not in known:
                    name = key if isinstance(key, str) else type(key).__name__
                    raise UserError(
                        f"optimizer state {name} can't be saved in a checkpoint: it belongs to no parameter"
                    )
            state = {n: plain(n, found[k]) for n, _, found, k in self._slots() if not isinstance(found[k], Tensor)}
            groups = zip(self.optimizer.param_groups, self._initial_groups, strict=True)
            return {"state": state, "groups": [changed(group, initial) for group, initial in groups]}

        every = self.world.all_gather_object(collect)
        if len({json.dumps(one, sort_keys=True) for one in every}) > 1:  # as text, in which NaN equals NaN
            raise UserError("the plain values in the optimizer's state differ between ranks and can't be saved")
        return every[0]

    # -- restoring ----------------------------------------------------------------------------------------------------

    def restore(self, files: TensorFiles, values: Mapping[str, Any] | None, *, complete: bool) -> None:
        """Restore the state in ``files`` and ``values``. The weights must be loaded afterwards, because this may change them.
        This is a collective.

        Tensors are restored in the dtype in which they were saved. If nothing was saved, the state is empty afterwards.

        Args:
            files: The tensors, written by any strategy on any number of ranks.
            values: The plain values as `pack` returns them; ``None`` in checkpoints of earlier versions.
            complete: Whether a parameter without a saved state had none.

        Raises:
            UserError: The saved state does not fit the optimizer, the parameters or the number of ranks. Nothing is changed,
                unless the optimizer was new.
        """
        values = values or {}
        plain_values, groups = dict(values.get("state", {})), values.get("groups", [])
        names = saved_names(files, self.world)
        of_rank = [name for name, saved in names.items() if saved != name]
        if of_rank and dict(enumerate(values.get("layout", []))).get(self.world.rank) != self._layout():
            raise UserError(f"{of_rank[0]} was saved for this process's shards, which are others now; {AS_BEFORE}")
        parameters = dict(self.model.hf_named_parameters())
        with_state = {name.partition("/")[0] for name in (*names, *plain_values)}
        trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
        check_parameters({*names, *plain_values}, trained, complete=complete)
        if any(groups) and len(groups) != len(self._initial_groups):
            raise UserError(
                f"the checkpoint's optimizer has {len(groups)} parameter groups, this run's {len(self._initial_groups)}"
            )
        if self.world.any_rank(any(not self.optimizer.state.get(parameters[name]) for name in with_state))[0]:
            self._initialise()
        self._check_groups(groups)
        like = self._like(files, names, plain_values)
        check_shapes(files, like, names)
        places = {name: (found, key) for name, _, found, key in self._slots()}
        for name, tensor in like.items():
            found, key = places.get(name) or self._new_place(name, parameters)
            found[key] = tensor
            fill(tensor, files, names[name])
        for name, value in plain_values.items():
            found, key = places.get(name) or self._new_place(name, parameters)
            found[key] = _like_type(found.get(key), value)
        for name in parameters.keys() - with_state if self._starts_empty else ():
            self.optimizer.state.pop(parameters[name], None)
        self._restore_groups(groups)

    def _new_place(self, name: str, parameters: Mapping[str, nn.Parameter]) -> tuple[dict[Any, Any], str]:
        """Return the dict, made where it is missing, and the key of a value that the first update does not create."""
        parameter, *dicts, key = name.split("/")
        found: dict[Any, Any] = self.optimizer.state[parameters[parameter]]
        for outer in dicts:
            found = found.setdefault(outer, {})
        return found, key

    def _check_groups(self, saved: list[dict[str, Any]]) -> None:
        """Raise ``UserError`` if a saved value belongs to no value of the parameter groups that `pack` saves."""
        for i, (group, values) in enumerate(zip(self.optimizer.param_groups, saved, strict=False)):
            if foreign := sorted(values.keys() - _snapshot(group).keys()):
                raise UserError(
                    f"the checkpoint sets {foreign[0]!r} of the optimizer's parameter group {i}, which is no value that this "
                    "run's optimizer changes; resume with the optimizer of before, or start a new run from the checkpoint's "
                    "weights (model_name=<checkpoint>)"
                )

    def _restore_groups(self, saved: list[dict[str, Any]]) -> None:
        """Set the values of the parameter groups to the saved ones, and the others to what they were at the start."""
        for i, (group, initial) in enumerate(zip(self.optimizer.param_groups, self._initial_groups, strict=True)):
            own = deepcopy(initial) | (saved[i] if i < len(saved) else {})
            group.update({key: _like_type(initial.get(key), value) for key, value in own.items()})

    def _initialise(self) -> None:
        """Make the optimizer create its state, by an update with gradients of zero."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _like(self, files: TensorFiles, names: dict[str, str], values: dict[str, Any]) -> dict[str, Tensor]:
        """Return by name the tensor into which a saved one is copied. A number that earlier versions saved as a tensor is
        moved from ``names`` to ``values``.

        Raises ``UserError`` if the optimizer keeps more than was saved, if it is not known how to shard a tensor, or if a
        name stands for a value and for a dict.
        """
        _check_nesting({*names, *values})
        like: dict[str, Tensor] = {}
        saved = {name.partition("/")[0] for name in (*names, *values)}
        for name, _, found, key in self._slots():
            value = found[key]
            if name in names and isinstance(value, Tensor):
                like[name] = _in_dtype(value, files.dtype(names[name]))
            elif name in names and isinstance(value, bool | int | float) and not files.shape(names[name]):
                values[name] = type(value)(files.read(names.pop(name)).item())
            elif name not in names and name not in values and value != {} and name.partition("/")[0] in saved:
                raise UserError(
                    f"optimizer state {name} is not in the checkpoint, whose optimizer had other settings; resume with those, "
                    "or start a new run from the checkpoint's weights (model_name=<checkpoint>)"
                )
        parameters = dict(self.model.hf_named_parameters())
        for name in sorted(names.keys() - like.keys()):  # the first update does not create it
            like[name] = _empty(name, parameters[name.partition("/")[0]], files, names[name])
        return like


def check_parameters(slots: set[str], trained: set[str], *, complete: bool) -> None:
    """Raise ``UserError`` for state of a parameter that is not ``trained``, and, unless the checkpoint is ``complete`` and says
    that they had none, for parameters without state, which would silently be initialised again."""
    names = {slot.partition("/")[0] for slot in slots}
    for slot in sorted(slots):
        if slot.partition("/")[0] not in trained:
            raise UserError(f"optimizer state {slot}: the model has no such trainable parameter")
    missing = sorted(trained - names)
    if slots and missing and not complete:
        raise UserError(
            f"the checkpoint has no optimizer state for {len(missing)} parameters, e.g. {missing[0]}; resume from an "
            "earlier one (resume=<run>/checkpoints/step-…), or start a new run from its weights (model_name=<checkpoint>)"
        )


def _places(prefix: str, found: dict[Any, Any]) -> Iterator[tuple[str, dict[Any, Any], Any]]:
    for key, value in found.items():
        if isinstance(value, dict) and value:  # an empty one is a value
            yield from _places(f"{prefix}/{key}", value)
        else:
            yield f"{prefix}/{key}", found, key


def _check_keys(name: str, found: dict[Any, Any]) -> None:
    """Raise ``UserError`` for a key from whose name it could not be restored."""
    for key, value in found.items():
        if not isinstance(key, str) or "/" in key:
            raise UserError(
                f"optimizer state {name} can't be saved in a checkpoint: its key {key!r} is not a string without '/'"
            )
        if isinstance(value, dict):
            _check_keys(f"{name}/{key}", value)


def _check_nesting(names: set[str]) -> None:
    """Raise ``UserError`` if one of ``names`` is in another one that holds a value."""
    for name in sorted(names):
        outer = name
        while outer := outer.rpartition("/")[0]:
            if outer in names:
                raise UserError(f"optimizer state {outer} is in the checkpoint, and {name} in it")


def _is_replica(name: str, parameter: nn.Parameter) -> bool:
    """Return whether a plain tensor must be equal on all ranks: all of them make the same updates of a parameter that is not
    sharded, and a step counter counts the same steps."""
    return not isinstance(parameter, DTensor) or name.endswith("/step")


def _empty(name: str, parameter: nn.Parameter, files: TensorFiles, saved: str) -> Tensor:
    """Return an empty tensor for state that the optimizer creates after its first update."""
    shape, dtype = files.shape(saved), getattr(torch, files.dtype(saved))
    if saved == name and shape == tuple(parameter.shape):
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    if saved == name and shape and isinstance(parameter, DTensor):
        raise UserError(f"optimizer state {name}: the first update does not create it, so its sharding is not known")
    return torch.empty(shape, dtype=dtype, device=parameter.device)


def _in_dtype(tensor: Tensor, dtype: str) -> Tensor:
    wanted = getattr(torch, dtype)
    return tensor if tensor.dtype == wanted else torch.empty_like(tensor, dtype=wanted)


def _like_type(example: Any, value: Any) -> Any:
    """Return a value of JSON as a tuple where ``example`` is one."""
    return tuple(value) if isinstance(example, tuple) else value


def _snapshot(group: dict[str, Any]) -> dict[str, Any]:
    """Return copies of the plain values of a parameter group. Other values, such as a schedule, are settings."""
    return {k: deepcopy(v) for k, v in group.items() if k not in UNSAVED and not callable(v)}


def changed(group: dict[str, Any], initial: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a parameter group that training has changed. Raises ``UserError`` for one that JSON can't
    represent."""
    found = {}
    for key, value in _snapshot(group).items():
        before = initial.get(key)
        if isinstance(value, Tensor) and isinstance(before, Tensor) and torch.equal(value, before):
            continue
        if isinstance(value, Tensor) or (value is not before and value != before):  # of NaN, it is the same object
            found[key] = plain(f"value {key!r} of a parameter group", value)
    return found


def plain(name: str, value: Any) -> Any:
    """Return ``value`` as JSON gives it back. Raises ``UserError`` for a value that JSON can't represent."""
    try:
        return json.loads(json.dumps(value))
    except ValueError:
        raise UserError(f"optimizer state {name} can't be saved in a checkpoint: it contains itself") from None
    except TypeError:
        where = f" in a {type(value).__name__}" if isinstance(value, list | tuple | dict) else ""
        raise UserError(
            f"optimizer state {name} can't be saved in a checkpoint: a {_not_json(value)}{where} is not JSON"
        ) from None


def _not_json(value: Any) -> str:
    """Return the name of the first type in ``value`` that JSON does not have; empty where there is none."""
    if isinstance(value, list | tuple | dict):
        items = [*value, *value.values()] if isinstance(value, dict) else value
        return next(filter(None, map(_not_json, items)), "")
    return "" if value is None or isinstance(value, str | int | float) else type(value).__name__
