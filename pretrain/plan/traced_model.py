"""The model of a trace: the real modules with fake weights, of any number of layers."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pretrain.models.blocks import find_blocks
from pretrain.models.logits_map import LogitsMap
from pretrain.models.meta import put_buffers, replace_parameters
from pretrain.models.model_factory import ModelFactory
from pretrain.models.probe import by_positions
from pretrain.plan.compiled_blocks import partition_blocks
from pretrain.plan.torch_internals import TorchDispatchMode, real_tensors

if TYPE_CHECKING:
    from pretrain.models.causal_lm import CausalLM
    from pretrain.models.language_model import LanguageModel

COPIES = {  # operations between hidden state, head and logits that change no number
    *("view", "_unsafe_view", "slice", "select", "_to_copy", "clone", "alias", "detach", "unsqueeze", "squeeze"),
    *("transpose", "permute", "t", "device"),
}


@dataclass(frozen=True)
class TracedFactory(ModelFactory):
    """A factory whose weights are fake. It is used inside `simulation.fake_tensors`.

    Attributes:
        fused_loss: whether the loss is computed in chunks, see `has_copied_head`.
        compiles: whether the run compiles its blocks.
    """

    fused_loss: bool = field(default=False, kw_only=True)
    compiles: bool = field(default=False, kw_only=True)

    def build(self, device: torch.device) -> LanguageModel:
        model = self.build_on_meta()
        replace_parameters(model, lambda p: torch.empty_like(p, device=device) if p.is_meta else p)
        return model

    def build_on_meta(self) -> LanguageModel:
        with real_tensors():
            model = super().build_on_meta()
        buffers = {n: torch.empty(b.shape, dtype=b.dtype) for n, b in model.named_buffers(remove_duplicate=False)}
        put_buffers(model, buffers, torch.device("cpu"))
        model.fused_loss = self.fused_loss
        model.logits_map = LogitsMap()
        model.document_mask = by_positions
        if self.compiles:
            if self.spec.gradient_checkpointing != "selective":  # whose policy the graphs would not follow
                partition_blocks(find_blocks(model.hf))
            model._has_compiled_blocks = True  # so that the loss is computed as in a compiled step
        vars(model)["probe"] = lambda *_: None  # it compares values, which fake tensors do not have
        return model

    def files(self, build_on_meta: LanguageModel) -> Any:
        return Shapes(build_on_meta.hf_state())


class Shapes:
    """The weight files of a model that is not there: the same names and shapes, and fake values."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self._weights = weights

    def keys(self) -> Any:
        return self._weights.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._weights[name].shape)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        shape = list(self.shape(name))
        if stop is not None:
            shape[0] = stop - start
        return torch.empty(shape, dtype=self._weights[name].dtype, device="cpu")


def traced_spec(spec: Any, *, checkpointing: Any = None, layers: int | None = None) -> Any:
    """Return ``spec`` as it can be traced: not compiled, with attention that needs no GPU, and, where they are given, with
    another ``gradient_checkpointing`` or number of ``layers``."""
    attention = "eager" if spec.attention == "eager" else "sdpa"
    changed = {} if checkpointing is None else {"gradient_checkpointing": checkpointing}
    traced = replace(spec, compile=False, attention=attention, **changed)
    if layers is not None:
        config = with_layers(spec.hf_config(), layers)
        object.__setattr__(traced, "hf_config", lambda: deepcopy(config))
    return traced


def layers_of(spec: CausalLM) -> int | None:
    """Return the number of layers of a model; ``None`` if its config does not give it."""
    layers = getattr(spec.hf_config().get_text_config(), "num_hidden_layers", None)
    return layers if isinstance(layers, int) and layers > 0 else None


def with_layers(config: Any, layers: int) -> Any:
    """Return a transformers config with the first ``layers`` of its layers."""
    config = deepcopy(config)
    text = config.get_text_config()
    before = text.num_hidden_layers
    for key, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == before:
            setattr(text, key, value[:layers])
    text.num_hidden_layers = layers
    return config


def period_of(config: Any, checkpointing: Any) -> int:
    """Return the number of layers after which their kinds repeat."""
    every = checkpointing if isinstance(checkpointing, int) and not isinstance(checkpointing, bool) else 1
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or []
    period = next((n for n in range(1, len(kinds) + 1) if kinds[n:] == kinds[:-n]), 1)
    return math.lcm(period, every)


def has_copied_head(hf: Any) -> bool:
    """Return whether the logits are ``head(last hidden state)``: no operation before or after the head changes a number. This is
    the answer of `probe.has_plain_head` without values."""
    backbone, head = hf.base_model, hf.get_output_embeddings()
    if backbone is hf or not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        return False
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    before: list[int] = []
    alone, seen = _Operations(), _Operations()
    hooks = [
        head.register_forward_pre_hook(lambda *_: before.append(len(seen.names))),
        head.register_forward_hook(lambda *_: before.append(len(seen.names))),
    ]
    try:
        with torch.no_grad(), alone:
            backbone(input_ids=tokens, use_cache=False)
        with torch.no_grad(), seen:
            hf(input_ids=tokens, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if len(before) != 2 or seen.names[: len(alone.names)] != alone.names:
        return False
    return {*seen.names[len(alone.names) : before[0]], *seen.names[before[1] :]} <= COPIES


class _Operations(TorchDispatchMode):
    """Collects the names of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "prim":
            self.names.append(func.name().split("::")[-1].split(".")[0])
        return func(*args, **(kwargs or {}))
