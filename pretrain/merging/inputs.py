"""The models that a merge reads: which folders their names refer to, and whether they fit each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.checkpoint.config import CheckpointConfig
from pretrain.checkpoint.schema import read_state
from pretrain.checkpoint.store import CheckpointStore
from pretrain.checkpoint.weights import saved_transforms, weights_folder
from pretrain.runtime.errors import UserError
from pretrain.runtime.filesystem import expanded

if TYPE_CHECKING:
    from pretrain.distributed.sharding import TensorFiles
    from pretrain.models.causal_lm import Pretrained
    from pretrain.models.language_model import LanguageModel

NAMED = 3  # tensors that a message names
ROWS = 4096  # of a head that are compared with the embedding at a time
BY_POSITIONS = ("dynamic", "yarn", "longrope")  # scalings of RoPE that depend on max_position_embeddings
NO_COMPUTATION = {  # keys of config.json on which the outputs of a model with given weights do not depend
    *("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "name_or_path", "initializer_range"),
    *("use_cache", "tie_word_embeddings", "attn_implementation", "id2label", "label2id", "problem_type", "return_dict"),
    *("output_attentions", "output_hidden_states", "output_router_logits", "router_aux_loss_coef", "pretraining_tp"),
    *("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "hidden_dropout", "summary_first_dropout"),
}


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
    def outline(self) -> LanguageModel:
        """The model that its config describes, without values."""
        import torch

        return self.spec.build_on_meta(param_dtype=torch.float32)

    @cached_property
    def names(self) -> list[str]:
        """The weights of the architecture, each tied one once, in the order of the layers; or all tensors of the files where
        these have other names, which transformers converts."""
        wanted = [*self.outline.hf_state()]
        return wanted if self.files.keys() >= set(wanted) else sorted(self.files.keys())

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


def check_alike(inputs: Sequence[Input]) -> None:
    """Raise ``UserError`` unless all models have the tensors of the first one, in its shapes, and no others, compute the same
    from equal weights, and have tokenizers with the same tokens. A head that equals a tied embedding is no tensor of its own."""
    first = inputs[0]
    for one in inputs:
        tied, known = _tied(one), one.files.keys()
        if tied and tied[0] in known and not _is_embedding(one, *tied):
            raise UserError(
                f"{one.key}={one.name}: config.json sets tie_word_embeddings: true, but {tied[0]} in the weight files is not "
                "the embedding; set it to false, or remove the head from the files"
            )
    for other in inputs[1:]:
        wrong = [*_differing_tensors(first, other)]
        if wrong:
            more = f", and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
            raise UserError(f"{other.key}: these models can't be merged: {', '.join(wrong[:NAMED])}{more}")
        _check_configs(first, other)
        _check_tokenizers(first, other)


def _differing_tensors(first: Input, other: Input) -> Iterator[str]:
    known = other.files.keys()
    for name in first.names:
        if name not in known:
            yield f"{name} is missing in {other.name}"
        elif other.files.shape(name) != first.files.shape(name):
            shapes = (f"{list(one.files.shape(name))} in {one.name}" for one in (first, other))
            yield f"{name} is {' and '.join(shapes)}"
    own, tied = set(first.names), _tied(first)
    for name in other.names:
        if name not in own and not (tied and name == tied[0] and _is_embedding(other, *tied)):
            yield f"{name} is missing in {first.name}"


def _tied(one: Input) -> tuple[str, str] | None:
    """Return the names of head and embedding if they are one tensor of the architecture."""
    names: dict[int, list[str]] = {}
    hf = one.outline.hf
    head, embedding = hf.get_output_embeddings(), hf.get_input_embeddings()
    for name, module in hf.named_modules():
        names.setdefault(id(module), []).append(f"{name}.weight")
    if head is None or embedding is None or head.weight is not embedding.weight:
        return None
    return names[id(head)][0], names[id(embedding)][0]


def _is_embedding(one: Input, head: str, embedding: str) -> bool:
    """Return whether ``head`` in the files of a model has the values of ``embedding``."""
    import torch

    if not {head, embedding} <= one.files.keys() or one.files.shape(head) != one.files.shape(embedding):
        return False
    rows = one.files.shape(head)[0]
    blocks = ((start, min(start + ROWS, rows)) for start in range(0, rows, ROWS))
    return all(torch.equal(one.files.read(head, *block), one.files.read(embedding, *block)) for block in blocks)


def _check_configs(first: Input, other: Input) -> None:
    """Raise ``UserError`` if two configs, with the defaults of their architecture, make something else of equal weights."""
    ours, theirs = (_computation(one.spec.hf_config().to_dict()) for one in (first, other))
    if differing := sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)):
        values = (f"{found.get(differing[0])} in {one.name}" for found, one in ((ours, first), (theirs, other)))
        more = f", and {', '.join(differing[1:])}" if differing[1:] else ""
        raise UserError(
            f"{other.key}: these models can't be merged: their config.json differ, {differing[0]} is {' and '.join(values)}{more}"
        )


def _computation(config: Any) -> Any:
    """Return the values of a config, at any depth, on which the outputs of the model depend. Keys that an architecture does not
    know are kept unless they are false."""
    if not isinstance(config, dict):
        return config
    rope = str(config.get("rope_parameters"))
    without = NO_COMPUTATION | (set() if any(kind in rope for kind in BY_POSITIONS) else {"max_position_embeddings"})
    if config.get("layer_types"):  # which were made from it
        without.add("max_window_layers")
    return {
        key: _computation(value)
        for key, value in config.items()
        if value not in (None, False) and not (key in without or key.startswith("_") or key.endswith("_token_id"))
    }


def _check_tokenizers(first: Input, other: Input) -> None:
    if differing := first.vocabulary.items() ^ other.vocabulary.items():
        token = min(differing)[0]
        ids = (f"{one.vocabulary.get(token, 'absent')} in {one.name}" for one in (first, other))
        raise UserError(
            f"{other.key}: the tokenizers of {first.name} and {other.name} differ in {len({t for t, _ in differing})} tokens, "
            f"e.g. {token!r} is {' and '.join(ids)}; rows of their embeddings stand for different tokens"
        )
