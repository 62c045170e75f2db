"""The models that a merge reads: which folders their names refer to, and whether they fit each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.checkpoint.config import CheckpointConfig
from pretrain.checkpoint.schema import read_state
from pretrain.checkpoint.store import CheckpointStore
from pretrain.checkpoint.weights import saved_transforms, weights_folder
from pretrain.runtime.errors import UserError
from pretrain.runtime.filesystem import expanded

if TYPE_CHECKING:
    from pretrain.distributed.sharding import TensorFiles
    from pretrain.models.causal_lm import Pretrained

NAMED = 3  # tensors that a message names


@dataclass(frozen=True)
class Input:
    """One of the models of a merge.

    Attributes:
        key: The config key that names it.
        name: Its name in the config; for a checkpoint of a run, the checkpoint's path.
        spec: Its config, tokenizer and weight files.
        step: The step of a checkpoint; ``None`` for any other model.
    """

    key: str
    name: str
    spec: Pretrained
    step: int | None = None

    @cached_property
    def folder(self) -> Path:
        return self.spec.folder()

    @cached_property
    def files(self) -> TensorFiles:
        """The weights, of which only the headers are read here."""
        return self.spec.weights()

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """The tokens and their ids."""
        found: dict[str, int] = self.spec.tokenizer(None).get_vocab()
        return found


def open_input(key: str, name: str, spec: Pretrained) -> Input:
    """Return the model ``name`` of the config key ``key``, checked. ``spec`` has the other settings of a model.

    Raises ``UserError`` for a model that does not exist or is incomplete, and for transformed weights.
    """
    folder = weights_folder(name, key=key)
    found = Input(key, name, replace(spec, name_or_path=folder, tokenizer_name=None))
    try:
        found.spec.check(1)  # the sequence length does not matter here
    except UserError as error:
        raise UserError(str(error).replace("model_name=", f"{key}=", 1)) from None
    if saved_transforms(found.folder):
        raise UserError(
            f"{key}={name}: the weights of this checkpoint are transformed; merge the model/ of its run, or that of "
            "task=export with the run's transform="
        )
    step = int(read_state(found.folder)["progress"]["step"]) if (found.folder / "state.json").exists() else None
    return replace(found, step=step)


def open_checkpoints(names: Sequence[str], spec: Pretrained, *, last: int | None) -> list[Input]:
    """Return the checkpoints that ``names`` stand for, oldest first; a run stands for its ``last`` complete ones.

    Raises ``UserError`` for a run with fewer checkpoints, and for a model that is no checkpoint.
    """
    found = []
    for name in names:
        folder = expanded(name)
        store = CheckpointStore(folder / "checkpoints", CheckpointConfig())
        if not store.folder.is_dir():
            found.append(open_input("merge.models", name, spec))
            continue
        steps = store.complete_steps()
        if len(steps) < (last or 2):
            raise UserError(
                f"merge.models={name}: the run has {len(steps)} complete checkpoints, {last or 2} are needed; a run keeps "
                "checkpoint.keep_last of them"
            )
        found += [open_input("merge.models", str(store.path(step)), spec) for step in steps[-(last or len(steps)) :]]
    for one in found:
        if one.step is None:
            raise UserError(f"merge.models={one.name}: not a checkpoint of a run; wsm merges those")
    found.sort(key=lambda one: one.step or 0)
    for before, after in pairwise(found):
        if before.step == after.step:
            raise UserError(f"merge.models: {before.name} and {after.name} are both of step {after.step}")
    if len(found) < 2:
        raise UserError("merge.method=wsm: needs at least two checkpoints")
    return found


def check_alike(inputs: Sequence[Input], names: Sequence[str]) -> None:
    """Raise ``UserError`` unless each model has every tensor of ``names`` in the shape of the first model's, and its tokenizer
    has the first one's tokens."""
    first = inputs[0]
    for other in inputs[1:]:
        wrong, known = [], other.files.keys()
        for name in names:
            if name not in known:
                wrong.append(f"{name} is missing in {other.name}")
            elif other.files.shape(name) != first.files.shape(name):
                shapes = (f"{list(one.files.shape(name))} in {one.name}" for one in (first, other))
                wrong.append(f"{name} is {' and '.join(shapes)}")
        if wrong:
            more = f", and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
            raise UserError(f"{other.key}: these models can't be merged: {', '.join(wrong[:NAMED])}{more}")
        _check_tokenizers(first, other)


def _check_tokenizers(first: Input, other: Input) -> None:
    if differing := first.vocabulary.items() ^ other.vocabulary.items():
        token = min(differing)[0]
        ids = (f"{one.vocabulary.get(token, 'absent')} in {one.name}" for one in (first, other))
        raise UserError(
            f"{other.key}: the tokenizers of {first.name} and {other.name} differ in {len({t for t, _ in differing})} tokens, "
            f"e.g. {token!r} is {' and '.join(ids)}; rows of their embeddings stand for different tokens"
        )
