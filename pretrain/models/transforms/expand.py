"""Block expansion: copies of blocks between the old ones, which change nothing at the start (LLaMA Pro, Wu et al. 2024,
arXiv:2401.02415)."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import PositiveInt

from pretrain.models.transforms.base import ModelTransform
from pretrain.models.transforms.derived import Rows, derive
from pretrain.runtime.errors import UserError
from pretrain.runtime.patterns import compiled, summary

if TYPE_CHECKING:
    from torch import Tensor, nn

ATTENTION = {"o_proj", "out_proj", "dense", "c_proj", "wo"}  # names of the layers that end attention and MLP of a block
MLP = {"down_proj", "fc2", "dense_4h_to_h", "c_proj", "fc_out", "w2"}

BY_NUMBER = "scale_attn_by_inverse_layer_idx"


@dataclass(frozen=True)
class Expand(ModelTransform):
    """Insert copies of blocks, evenly spread. The last layers of their attention and MLP start at zero, so that the model
    computes exactly what it did before. The exported model is a plain one with more blocks.

    Attributes:
        blocks: Number of new blocks.
        freeze_old: true: only the new blocks are trained.
        outputs: Layers of a block that start at zero: auto, or a regex of their names.
    """

    blocks: PositiveInt = 2
    freeze_old: bool = True
    outputs: str = "auto"

    def check(self) -> None:
        if self.outputs != "auto":
            compiled(self.outputs, key="transform.expand.outputs")

    def apply(self, model: nn.Module) -> None:
        path, old = blocks_of(model)
        if self.blocks > len(old):
            raise UserError(
                f"transform.expand.blocks={self.blocks}: the model has {len(old)} blocks; at most one copy of each"
            )
        if getattr(model.config, BY_NUMBER, False):
            raise UserError(
                f"transform.expand: with {BY_NUMBER} in its config a block computes by its number and can't be moved"
            )
        origin = spread(len(old), self.blocks)
        plain = expanded(model, origin)
        new = plain.get_submodule(path)
        if len(new) != len(origin):
            raise UserError(
                f"transform.expand: the config of {type(model).__name__} does not say how many blocks it has"
            )
        if self.freeze_old:
            model.requires_grad_(False)
        is_copy = [j > 0 and origin[j] == origin[j - 1] for j in range(len(origin))]
        for j, i in enumerate(origin):
            check_same(old[i], new[j], i, j, of=type(model).__name__)
            zeros = self._zeros(old[i]) if is_copy[j] else set()
            fill_block(new[j], old[i], zeros=zeros, copy=is_copy[j])
        share_configs(new, plain.config, model.config)
        owner, _, child = path.rpartition(".")
        setattr(model.get_submodule(owner), child, new)

    def _zeros(self, block: nn.Module) -> set[str]:
        """Return the names of the weights and biases of a copy that start at zero."""
        layers = {name.rpartition(".")[0] for name, _ in block.named_parameters()} | {
            name
            for name, p in block.named_parameters()
            if p.ndim > 2  # of fused experts
        }
        if self.outputs == "auto":
            found = {name for name in layers if name.rpartition(".")[2] in ATTENTION | MLP}
            kinds = {bool("attn" in name or "attention" in name) for name in found}
            wanted = kinds == {True, False}
        else:
            pattern = compiled(self.outputs, key="transform.expand.outputs")
            found = {name for name in layers if pattern.search(name)}
            wanted = bool(found)
        if not wanted:
            raise UserError(
                f"transform.expand.outputs={self.outputs!r}: name the layers that end attention and MLP of a block by a "
                f"regex; there is {summary(sorted(layers))}"
            )
        return {n for n, _ in block.named_parameters() if n in found or n.rpartition(".")[0] in found}


def blocks_of(model: Any) -> tuple[str, Any]:
    """Return name and list of the blocks of a model. Raises ``UserError`` where it is unclear which these are."""
    from torch import nn

    number = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == number]
    found = [(n, m) for n, m in found if not any(n.startswith(f"{outer}.") for outer, _ in found if outer != n)]
    if len(found) != 1:
        raise UserError(f"transform.expand: {type(model).__name__} has no single list of {number} blocks")
    return found[0]


def spread(old: int, new: int) -> list[int]:
    """Return for each block of the expanded model the old one that it is, or is a copy of: ``new`` copies, each behind its
    original, evenly spread, the last one at the end. ``spread(4, 2)`` = [0, 1, 1, 2, 3, 3]."""
    copied = {(k + 1) * old // new - 1 for k in range(new)}
    return [i for i in range(old) for _ in range(2 if i in copied else 1)]


def expanded(model: Any, origin: list[int]) -> Any:
    """Change the config of ``model`` to that of the model with the blocks ``origin``, and return such a model, its parameters on
    the meta device. Values of the config with one item for each block are expanded with them."""
    from pretrain.models.transformers_internals import new_on_meta

    before = deepcopy(model.config)
    text = model.config.get_text_config()
    old = int(text.num_hidden_layers)
    for key, value in list(vars(text).items()):
        if isinstance(value, list | tuple) and len(value) == old:
            setattr(text, key, type(value)(value[i] for i in origin))
    text.num_hidden_layers = len(origin)
    try:
        return new_on_meta(model, dtype=model.dtype)
    except Exception as error:  # an architecture whose config can't be built with another number of blocks
        model.config = before
        raise UserError(
            f"transform.expand: {type(model).__name__} can't be built with {len(origin)} blocks: {' '.join(str(error).split())}"
        ) from None


def check_same(old: nn.Module, new: nn.Module, i: int, j: int, *, of: str) -> None:
    """Raise ``UserError`` if ``new``, block j of the expanded model, is another kind of block than ``old``, block i before, or
    has a setting that depends on its number. The number itself may be among its attributes (``layer_idx``)."""
    ours, theirs = dict(new.named_parameters()), dict(old.named_parameters())
    if {n: p.shape for n, p in ours.items()} != {n: p.shape for n, p in theirs.items()}:
        raise UserError(
            f"transform.expand: block {j} of {of} would have other weights than block {i}, of which it is a copy"
        )
    modules = dict(new.named_modules())
    for name, module in old.named_modules():
        mine, its = _plain_values(modules[name]), _plain_values(module)
        keys = [key for key in its if mine.get(key) != its[key] and (mine.get(key), its[key]) != (j, i)]
        if keys or type(modules[name]) is not type(module):
            what = f"{name}.{keys[0]}: {its[keys[0]]} → {mine.get(keys[0])}".lstrip(".") if keys else name
            raise UserError(
                f"transform.expand: the blocks of {of} depend on their number ({what}), so that block {i} can't be copied"
            )


def _plain_values(module: nn.Module) -> dict[str, Any]:
    kept = (bool, int, float, str, list, tuple, type(None))
    skipped = ("training", "gradient_checkpointing")
    return {k: v for k, v in vars(module).items() if isinstance(v, kept) and not k.startswith("_") and k not in skipped}


def fill_block(new: nn.Module, old: nn.Module, *, zeros: set[str], copy: bool) -> None:
    """Give ``new`` the parameters and buffers of ``old`` themselves, or with ``copy`` new ones with the same values, and zeros
    for the names ``zeros``."""
    for name, parameter in list(old.named_parameters(remove_duplicate=False)):
        owner, _, attribute = name.rpartition(".")
        value = derive(parameter, _zeros(parameter) if name in zeros else _same(parameter)) if copy else parameter
        setattr(new.get_submodule(owner), attribute, value)
    for name, buffer in list(old.named_buffers(remove_duplicate=False)):
        owner, _, attribute = name.rpartition(".")
        setattr(new.get_submodule(owner), attribute, buffer.clone() if copy else buffer)
    new.train(old.training)


def _same(parameter: Tensor) -> Rows:
    return lambda read, start, stop: read(parameter, start, stop)


def _zeros(parameter: Tensor) -> Rows:
    return lambda read, start, stop: parameter.new_zeros((stop - start, *parameter.shape[1:]), device="cpu")


def share_configs(new: nn.Module, made: Any, own: Any) -> None:
    """Let the modules of ``new`` have the config object ``own`` of the model instead of the copy ``made``, with which they were
    created: a later change of it must reach them too."""
    pairs = {id(made): own, id(made.get_text_config()): own.get_text_config()}
    for module in new.modules():
        if id(getattr(module, "config", None)) in pairs:
            module.config = pairs[id(module.config)]
