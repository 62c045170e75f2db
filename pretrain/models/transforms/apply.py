"""Apply model transforms to a Hugging Face model, find the origin of each of its weights, and convert the weights back.

A weight after the transforms is either the same Parameter (or buffer) object as one before, maybe under another name, or it
is new. The first kind is read from the model's files under its name before, the second kind keeps the value that the
transform gave it. This holds for every strategy, including those that build the model on the meta device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pretrain.checkpoint.rng import rng_state, seed_everything, set_rng_state
from pretrain.distributed.sharding import TensorFiles
from pretrain.models.language_model import weights_of
from pretrain.models.meta import replace_parameters
from pretrain.models.transformers_internals import new_on_meta
from pretrain.models.transforms.base import marks
from pretrain.models.transforms.derived import is_derived, rows_of
from pretrain.runtime.errors import UserError

if TYPE_CHECKING:
    from pretrain.models.transforms.base import ModelTransform

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Transformed:
    """What the ``transforms`` of a model have changed.

    Attributes:
        transforms: in the order in which they were applied; at least one.
        config: config of the model before the transforms.
        before: shape of every weight before the transforms, by name. A tied weight appears once.
        names: name of a weight after the transforms → its name before, for the weights that are not new.
        after: every weight after the transforms, by name, on the meta device.
        values: values of the new weights by name, on the CPU; empty for a model that was not built on the meta device, which
            has them itself.
        derived: new weights that are computed from others, by name; empty for a model that was not built on the meta device.
        origins: names of the weights before, by weight, to read those that ``derived`` needs.
        thaw_at: share of the run before which a parameter is not trained, by name, where a transform has set one.
        lr_factors: factor of a parameter's learning rate by name, where a transform has set one.
        first_rows: by name the first row that is trained, and up to which share of the run (``None``: to its end).
    """

    transforms: tuple[ModelTransform, ...]
    config: Any
    before: dict[str, Shape]
    names: dict[str, str]
    after: dict[str, Tensor] = field(repr=False)
    values: dict[str, Tensor] = field(repr=False)
    derived: dict[str, Tensor] = field(default_factory=dict, repr=False)
    origins: dict[Tensor, str] = field(default_factory=dict, repr=False)
    thaw_at: dict[str, float] = field(default_factory=dict)
    lr_factors: dict[str, float] = field(default_factory=dict)
    first_rows: dict[str, tuple[int, float | None]] = field(default_factory=dict)

    def export(
        self, plain: Any, weights: dict[str, Tensor], companions: dict[str, dict[str, bytes]] | None = None
    ) -> dict[str, Tensor]:
        """Return the weights of ``plain``, a model without the transforms. They are made from all full ``weights`` of the
        transformed model by the transforms in reverse order. ``companions`` receives the folders that they write beside it.
        Raises ``UserError`` if ``plain`` has other weights."""
        for transform in reversed(self.transforms):
            if companions is not None and hasattr(transform, "companions"):
                companions |= transform.companions(weights)
            if hasattr(transform, "export"):  # a class without the base class may have none
                weights = transform.export(weights)
            if not isinstance(weights, dict):
                raise UserError(f"transform {_name(transform)}: export() returned no dict of tensors")
        check_exported(weights, plain)
        return weights

    def checkpoint_config(self, changed: Any) -> Any:
        """Return the config of a checkpoint: that before the transforms, because they are applied again, but with the vocabulary
        of the tokenizer. ``changed`` is the config after them."""
        config = deepcopy(self.config)
        if any(getattr(transform, "grows_vocabulary", False) for transform in self.transforms):
            config.get_text_config().vocab_size = changed.get_text_config().vocab_size
        return config

    def check_export(self, hf: Any) -> None:
        """Raise ``UserError`` if `export` would not return the weights of the plain architecture, as far as that can be found
        without their values: a run must not find it out at its end. ``hf`` is the transformed model."""
        try:
            self.export(plain_model(hf), dict(self.after))
        except UserError:
            raise
        except Exception:  # an export that reads values can't be run on tensors without any
            return


def apply_transforms(transforms: Sequence[ModelTransform], hf: Any, *, seed: int) -> Transformed | None:
    """Apply ``transforms`` to ``hf`` in order; without any, do nothing and return ``None``.

    They draw their random numbers from generators seeded by ``seed``, so the new weights are equal on every rank and under every
    strategy. The random state of the process is unchanged afterwards. If parameters of ``hf`` are on the meta device, the new
    ones are moved there too and their values are returned.

    Raises ``UserError`` for a new parameter on the meta device.
    """
    if not transforms:
        return None
    config, before = deepcopy(hf.config), weights_of(hf)
    on_meta = any(tensor.is_meta for tensor in before.values())
    old = {id(tensor): name for name, tensor in before.items()}
    with seeded(seed):
        for transform in transforms:
            transform.apply(hf)
            _check_new(transform, {n: t for n, t in weights_of(hf).items() if id(t) not in old})
    after = weights_of(hf)
    names = {name: old[id(tensor)] for name, tensor in after.items() if id(tensor) in old}
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in after.items()}
    marked = [marks(hf.named_parameters(), mark) for mark in ("thaw_at", "lr_factor", "first_row")]
    values: dict[str, Tensor] = {}
    derived: dict[str, Tensor] = {}
    if on_meta:
        new = {name: tensor for name, tensor in after.items() if name not in names}
        derived = {name: tensor for name, tensor in new.items() if is_derived(tensor)}
        values = {name: tensor.detach().clone() for name, tensor in new.items() if name not in derived}
        replace_parameters(hf, lambda p: p if p.is_meta else p.to("meta"))
    sizes = {name: tuple(tensor.shape) for name, tensor in before.items()}
    return Transformed(
        tuple(transforms),
        config,
        sizes,
        names,
        shapes,
        values,
        derived=derived,
        origins={tensor: name for name, tensor in before.items()} if derived else {},
        thaw_at=marked[0],
        lr_factors=marked[1],
        first_rows=marked[2],
    )


def _check_new(transform: ModelTransform, new: dict[str, Tensor]) -> None:
    for name, tensor in new.items():
        if tensor.is_meta and not is_derived(tensor):
            raise UserError(
                f"transform {_name(transform)}: its new weight {name} is on the meta device, which holds no values; apply() must "
                "create it on the CPU with its initial values, even where the model's own weights are on the meta device"
            )


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside this context all generators are seeded by ``seed``, on every rank alike; afterwards they are as before."""
    state = rng_state()
    seed_everything(seed)
    try:
        yield
    finally:
        set_rng_state(state)


class TransformedFiles(TensorFiles):
    """The weights of a transformed model: old ones from the files of the plain model, new ones with the values that the
    transforms gave them, or computed from old ones. Only the rows that are read are in memory."""

    def __init__(self, files: TensorFiles, transformed: Transformed) -> None:
        self._files, self._names, self._values = files, transformed.names, transformed.values
        self._derived, self._origins = transformed.derived, transformed.origins

    def keys(self) -> set[str]:
        return {*self._names, *self._values, *self._derived}

    def shape(self, name: str) -> Shape:
        if name in self._derived:
            return tuple(self._derived[name].shape)
        return tuple(self._values[name].shape) if name in self._values else self._files.shape(self._names[name])

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        if name in self._derived:
            return self._rows(self._derived[name], start, self.shape(name)[0] if stop is None else stop)
        if name not in self._values:
            return self._files.read(self._names[name], start, stop)
        value = self._values[name]
        return value[start:stop] if value.ndim else value

    def _rows(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        """Return rows of a weight that the model has or had while the transforms changed it."""
        if is_derived(tensor):
            return rows_of(tensor, self._rows, start, stop)
        return self._files.read(self._origins[tensor], start, stop) if tensor in self._origins else tensor[start:stop]


def plain_model(hf: Any, config: Any = None) -> Any:
    """Return a model of the class of ``hf`` without transforms, its parameters on the meta device. ``config``: its config; by
    default that of ``hf``."""
    plain = new_on_meta(hf, config=config, dtype=hf.dtype)
    plain.generation_config = hf.generation_config
    return plain


def check_exported(weights: dict[str, Tensor], plain: Any) -> None:
    """Raise ``UserError`` unless ``weights`` have the names and shapes of those of ``plain``; of tied weights one is enough."""
    wanted = plain.state_dict(keep_vars=True)
    given = {id(wanted[name]) for name in weights if name in wanted}
    missing = [name for name, tensor in wanted.items() if id(tensor) not in given]
    wrong = [
        *(f"{name} is missing" for name in missing),
        *(f"{name} is none of its weights" for name in weights if name not in wanted),
        *(
            f"{name} is {list(tensor.shape)} instead of {list(wanted[name].shape)}"
            for name, tensor in weights.items()
            if name in wanted and tensor.shape != wanted[name].shape
        ),
    ]
    if wrong:
        raise UserError(
            f"the transforms' export() does not return the weights of {type(plain).__name__}: {wrong[0]}"
            + (f", and {len(wrong) - 1} more" if len(wrong) > 1 else "")
        )


def _name(transform: ModelTransform) -> str:
    return f"{type(transform).__module__}.{type(transform).__qualname__}"
