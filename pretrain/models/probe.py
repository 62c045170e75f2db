"""Probes of a model's behaviour. When a model is built, it is run on a few tokens to determine whether its head is linear,
whether its attention is causal, and how it keeps packed documents apart. There is no list of architectures.

A probe changes the tokens that must not be visible and requires every output to stay the same to the last bit. Two inputs of
one shape go through the same kernels, so any difference is a leak and not rounding. The outputs of all modules are compared,
not the logits alone: in 16 bits the logits may round away a small leak that training would make large.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_masks_for_generate

from pretrain.models.hub.files import POSITION_KEYS
from pretrain.models.logits_map import LogitsMap, candidates
from pretrain.models.transformers_internals import has_forward_hooks
from pretrain.runtime.console import notice
from pretrain.runtime.errors import UserError

# (model, position_ids, dtype) → arguments of its forward
DocumentMask = Callable[[Any, Tensor, torch.dtype], dict[str, Any]]

PROBE_LOGIT = 100.0  # larger than any soft cap in use (Gemma 2: 30), so that a capped head can't look linear
LENGTH = 12  # tokens of a document
WINDOW = 4  # attention window during a probe, so that documents are longer than windows and chunks
WINDOWS = ("sliding_window", "attention_chunk_size", "attention_window_size", "sliding_window_size")
ULPS = 32  # of the largest value: the tolerance between two ways to compute the same result in fp32


# -- document masks ---------------------------------------------------------------------------------------------------


def by_positions(hf: Any, position_ids: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """Return positions only, which is enough for most models: with no cache and no mask, transformers masks attention where
    positions restart."""
    return {"position_ids": position_ids}


def by_masks(hf: Any, position_ids: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """Return positions and attention masks, one mask for each type of layer with its window or chunk. Models that do not derive
    masks from positions (OPT, GPT-OSS) need them. transformers builds them, because a plain mask would replace the windows."""
    rows, length = position_ids.shape
    embeds = torch.empty(rows, length, 0, dtype=dtype, device=position_ids.device)  # only its shape and dtype are read
    masks = create_masks_for_generate(hf.config, embeds, None, None, position_ids)
    return {"position_ids": position_ids, "attention_mask": masks}


DOCUMENT_MASKS: tuple[DocumentMask, ...] = (by_positions, by_masks)


# -- probes -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def check_causal(hf: Any) -> None:
    """Raise ``UserError`` for a model whose logits at a token change with the tokens after it, because training it would teach it
    to copy its targets."""
    ids = _documents(hf)
    if ids is None:
        return
    with _probing(hf):
        one, two = (_logits(hf, ids[order])[:, : ids.shape[1]] for order in ([0, 1, 2], [0, 3, 4]))
    if not _is_rounding(*_finite(one, two)):
        raise UserError(
            f"{type(hf).__name__} is not causal: its logits change with later tokens, so it can't "
            "be trained or scored as a causal model; an encoder (BERT, RoBERTa) needs is_decoder: true in its config.json "
            "(model=scratch: model.overrides.is_decoder=true)"
        )


@torch.no_grad()
def find_document_mask(hf: Any, ways: Sequence[DocumentMask] | None = None) -> DocumentMask | None:
    """Return the first of ``ways`` in which this causal model keeps packed documents apart, or ``None`` if it can't. By default
    that are `DOCUMENT_MASKS`.

    Every module's output for a document between two others must be bit for bit independent of those, and the logits must equal,
    up to rounding, those of the same document at the start of a row, where no other document is visible.
    """
    ids = _documents(hf)
    if ids is None:
        return None
    length = ids.shape[1]
    positions = torch.arange(length, device=hf.device).repeat(3).unsqueeze(0)
    with _probing(hf):
        alone = _logits(hf, ids[[0, 1, 2]])[:, :length]
        for way in DOCUMENT_MASKS if ways is None else ways:
            try:
                given = way(hf, positions, embedding_dtype(hf))
                one, two = (_outputs(hf, ids[order], length, given) for order in ([1, 0, 2], [3, 0, 4]))
            except (TypeError, ValueError, RuntimeError, LookupError, AttributeError, AssertionError):
                continue  # no such argument, no such mask
            same = len(one) == len(two) and all(torch.equal(*_finite(*pair)) for pair in zip(one, two, strict=True))
            if same and _similar(*_finite(one[-1], alone)):
                return way
    return None


def has_plain_head(hf: Any) -> bool:
    """Return whether the logits are exactly the output embedding applied to the last hidden state of ``base_model``."""
    found = find_logits_map(hf)
    return found is not None and found.is_plain


@torch.no_grad()
def find_logits_map(hf: Any) -> LogitsMap | None:
    """Return the function of the head's output that the logits are, if the head is a matrix that is applied to the last hidden
    state of ``base_model``; otherwise ``None``.

    The probe checks that the input of the head is what ``base_model`` returns, and that the logits are one of the functions that
    the config may mean of the head's output for large random inputs. This detects soft-capping, a logit scale and a further
    layer, even while the model's own logits are still small. A head that a transform has wrapped or hooked may be equal to its
    matrix now and not after the first step, so it has none.
    """
    backbone, head = hf.base_model, hf.get_output_embeddings()
    if backbone is hf or not _is_linear(head):
        return None
    device, training = head.weight.device, hf.training
    noise = torch.randn(1, 4, head.in_features, generator=torch.Generator().manual_seed(0)).to(device)
    planted = (noise * PROBE_LOGIT / (head.weight.float().std() * head.in_features**0.5 + 1e-12)).to(head.weight.dtype)
    given: list[Tensor] = []

    def plant(module: nn.Module, args: tuple[Tensor]) -> Tensor:
        given.append(args[0])
        return planted

    ids = torch.arange(1, 5, device=device).unsqueeze(0) % head.out_features
    hf.eval()
    hook = head.register_forward_pre_hook(plant)
    try:
        logits = hf(input_ids=ids, use_cache=False).logits
        hook.remove()
        hidden = getattr(backbone(input_ids=ids, use_cache=False), "last_hidden_state", None)
        if len(given) != 1 or hidden is None or not hidden.shape == given[0].shape == planted.shape:
            return None
        outputs = head(planted)
        known = (found for found in candidates(hf.config.get_text_config()) if _close(logits, found(outputs)))
        return next(known, None) if _close(hidden, given[0]) else None
    finally:
        hook.remove()
        hf.train(training)


@torch.no_grad()
def balancing_coefficient(hf: Any) -> float:
    """Return the factor of the load balancing loss of a mixture of experts (Fedus et al., arXiv:2101.03961). It is 0 unless the
    config enables the loss (``output_router_logits``) and the architecture has one."""
    config = hf.config.get_text_config()
    if not getattr(config, "output_router_logits", False):
        return 0.0
    found = [getattr(config, key, None) for key in ("router_aux_loss_coef", "aux_loss_coef")]
    coefficient = next((float(value) for value in found if isinstance(value, (int, float))), 0.0)
    ids = _documents(hf)
    if not coefficient or ids is None:
        return 0.0
    with _probing(hf):
        try:
            loss = hf(input_ids=ids[:1], use_cache=False, output_router_logits=True).aux_loss
        except (TypeError, AttributeError):
            loss = None
    if not isinstance(loss, Tensor):
        notice(
            f"output_router_logits: true in config.json: {type(hf).__name__} has no load balancing loss; none is added"
        )
        return 0.0
    return coefficient


def embedding_dtype(hf: Any) -> torch.dtype:
    """Return the dtype of the input embedding's weight, which may be inside of a module that a transform has added."""
    return next(hf.get_input_embeddings().parameters()).dtype


def num_positions(config: Any) -> int:
    """Return the longest sequence that a model with this config has positions for; ``sys.maxsize`` without a limit."""
    limits = [getattr(config, key, None) for key in POSITION_KEYS]
    return min((n for n in limits if isinstance(n, int) and n > 0), default=sys.maxsize)


# -- tools ------------------------------------------------------------------------------------------------------------


def _documents(hf: Any) -> Tensor | None:
    """Return five documents of different tokens, int64 [5, n], short enough that three of them fit the model's positions;
    ``None`` if the model has fewer than three positions."""
    length = min(LENGTH, num_positions(hf.config) // 3)
    if length < 1:
        return None
    ids = torch.arange(5 * length, device=hf.device).reshape(5, length)
    embedding = hf.get_input_embeddings()
    return (7 + 3 * ids) % getattr(embedding, "num_embeddings", hf.config.get_text_config().vocab_size)


def _logits(hf: Any, documents: Tensor, given: dict[str, Any] | None = None) -> Tensor:
    """Return the logits [1, S, V] of the documents concatenated into one row."""
    logits: Tensor = hf(input_ids=documents.reshape(1, -1), use_cache=False, **given or {}).logits
    return logits


def _outputs(hf: Any, documents: Tensor, length: int, given: dict[str, Any]) -> list[Tensor]:
    """Return every module's output for the tokens of the second document, in call order; the logits are last."""
    seen: list[Tensor] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        if isinstance(first, Tensor) and first.is_floating_point() and first.ndim in (2, 3):
            tokens = first[0] if first.ndim == 3 and len(first) == 1 else first  # experts get flattened rows
            if len(tokens) == documents.numel():
                seen.append(tokens[length : 2 * length].clone())

    with ExitStack() as stack:
        for module in hf.modules():
            stack.callback(module.register_forward_hook(note).remove)
        logits = _logits(hf, documents, given)
    return [*seen, logits[:, length : 2 * length]]


@contextmanager
def _probing(hf: Any) -> Iterator[None]:
    """Inside this context the model is in eval mode, its attention windows are small, and every token goes through the same
    kernels. The random state is unchanged afterwards."""
    training = hf.training
    with ExitStack() as stack:
        cuda = [hf.device] if hf.device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        stack.enter_context(_deterministic(active=bool(cuda)))
        configs: dict[int, Any] = {id(m.config): m.config for m in hf.modules() if hasattr(m, "config")}
        for config in configs.values():
            for key in WINDOWS:
                size = getattr(config, key, None)
                if isinstance(size, int) and size > WINDOW:
                    setattr(config, key, WINDOW)
                    stack.callback(setattr, config, key, size)
            if getattr(config, "output_router_logits", False):  # the load balancing loss accepts no document masks
                config.output_router_logits = False
                stack.callback(setattr, config, "output_router_logits", True)
        for module in hf.modules():
            if _is_experts(module):
                module.forward = _token_by_token(module.forward)
                stack.callback(delattr, module, "forward")
        hf.eval()
        stack.callback(hf.train, training)
        yield


@contextmanager
def _deterministic(*, active: bool) -> Iterator[None]:
    """Use deterministic algorithms, because a GPU otherwise sums the outputs of experts in a varying order."""
    if not active:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _is_linear(head: Any) -> bool:
    """Return whether ``head`` multiplies by its matrix and does nothing else."""
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward or "forward" in vars(head):
        return False
    return not has_forward_hooks(head)


def _is_experts(module: nn.Module) -> bool:
    """Return whether ``module`` has the form of transformers 5's experts: forward(hidden [tokens, h], indices, weights
    [tokens, k])."""
    if not type(module).__name__.endswith("Experts") or "forward" in vars(module):
        return False
    return len(signature(module.forward).parameters) == 3


def _token_by_token(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap the forward of experts so that it runs one token at a time. The rounding of an expert depends on how many tokens it
    gets at once, and that depends on the other documents."""

    def each(*inputs: Tensor) -> Tensor:
        return torch.cat([forward(*(each[t : t + 1] for each in inputs)) for t in range(len(inputs[0]))])

    return each


def _finite(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return both tensors with zeros where either is not finite. A model may overflow at some tokens, and attention propagates
    non-finite values even with weight 0. Such values can't be compared; the run's guard handles them."""
    both = a.isfinite() & b.isfinite() if a.shape == b.shape else torch.tensor(True, device=a.device)
    return torch.where(both, a, 0), torch.where(both, b, 0)


def _close(a: Tensor, b: Tensor) -> bool:
    """Return whether the tensors are equal up to rounding in their dtype, relative to the largest value."""
    eps = torch.finfo(a.dtype).eps
    a, b = a.float(), b.float()
    return bool((a - b).abs().max() <= ULPS * eps * b.abs().max())


def _is_rounding(a: Tensor, b: Tensor) -> bool:
    """Return whether the tensors differ by rounding only. In some models (ProphetNet) rounding depends on the entire sequence:
    in 16 bits this changes few tokens, whereas visible later tokens change all of them."""
    if a.dtype == torch.float32:
        return torch.equal(a, b) or _close(a, b)
    return bool(_errors(a, b).median() < torch.finfo(torch.bfloat16).eps / 8)


def _errors(a: Tensor, b: Tensor) -> Tensor:
    """Return the error of each token of [.., n, V], relative to the norm of its logits."""
    a, b = a.float(), b.float()
    return torch.linalg.vector_norm(a - b, dim=-1) / torch.linalg.vector_norm(b, dim=-1).clamp_min(1e-30)


def _similar(a: Tensor, b: Tensor) -> bool:
    """Return whether at least half of the tokens [.., n, V] differ by rounding only. In 16 bits a few tokens may be routed to
    other experts."""
    if a.dtype == torch.float32:
        return _close(a, b)
    return bool(_errors(a, b).median() <= 1.5 * torch.finfo(torch.bfloat16).eps)
