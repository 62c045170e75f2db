"""A Hugging Face causal LM whose forward computes the loss, so that a wrapper (DDP, FSDP) wraps the head's weight too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.data.batch import IGNORE
from pretrain.distributed.sharding import TensorFiles, check_names, fill
from pretrain.models import document_attention, packing
from pretrain.models.blocks import find_blocks
from pretrain.models.compilation import Compile, before_first_compilation, compile_blocks, compiled
from pretrain.models.kl_divergence import Head, kl_divergence
from pretrain.models.logits_map import LogitsMap
from pretrain.models.loss import linear_cross_entropy
from pretrain.models.probe import (
    DocumentMask,
    balancing_coefficient,
    by_masks,
    by_positions,
    check_causal,
    embedding_dtype,
    find_document_mask,
    find_logits_map,
    num_positions,
)
from pretrain.models.recomputed_products import recomputed_products
from pretrain.models.token_losses import Scores, cross_entropy, linear_token_losses
from pretrain.runtime.console import notice
from pretrain.runtime.errors import UserError

if TYPE_CHECKING:
    from pretrain.models.transforms.apply import Transformed


class LanguageModel(nn.Module):
    """A causal LM of transformers together with its training loss.

    Strategies wrap this module and not ``hf``, because the head of ``hf`` is used outside of the forward of ``hf``. Dropout is
    as the model's config sets it. With ``compile=True`` or ``"blocks"``, each block and the loss of one chunk are compiled for
    the training step; with ``"graph"``, or if the model declares no blocks, backbone and loss become one graph. Evaluation, whose
    last batch is smaller than the others, runs eagerly.

    Attributes:
        hf: the wrapped transformers model.
        fused_loss: whether the logits are exactly ``head(last hidden state)``, which a probe determines. The loss is then
            computed by `linear_cross_entropy` without all logits in memory. Models that cap or scale their logits use their own
            head.
        logits_map: what the logits are of the output of the head; ``None`` if they are not a function of the last hidden state's
            product with a matrix.
        document_mask: how the model keeps packed documents apart; ``None`` if it can't.
        long_document_mask: how it does so in rows longer than `document_attention.LONG`, on a CPU, not compiled and not balanced;
            ``None``: as in shorter ones.
        balancing: the weight of the load balancing loss of a mixture of experts; 0 unless the config has
            ``output_router_logits: true``.
        is_compiled: whether the training step is compiled.
        repeats_products: whether products are computed again in the backward instead of stored, if the model is on a CPU
            and not compiled.
        picks_kernels: whether the kernels of attention are chosen (``model.attention=auto``).
        transformed: what transforms have changed in ``hf``; ``None`` without transforms.
        base_head: a copy on the host of the head of the base model (before training), which the first forward without labels
            makes; ``None`` before it.
    """

    def __init__(
        self,
        hf: Any,
        *,
        compile: Compile = False,  # noqa: A002 (the key users know)
        transformed: Transformed | None = None,
    ) -> None:
        super().__init__()
        self.hf = hf
        self.transformed = transformed
        self.base_head: Head | None = None
        hf.config.use_cache = False
        self.fused_loss = False
        self.logits_map: LogitsMap | None = None
        self.document_mask: DocumentMask | None = None
        self.long_document_mask: DocumentMask | None = None
        self.balancing = 0.0
        self.repeats_products = True
        self.picks_kernels = False
        self.is_compiled = compile is not False
        if not any(p.is_meta for p in hf.parameters()):
            self.probe()
        self._compiled: Callable[..., Tensor] | None = None
        self._has_compiled_blocks = False
        if self.is_compiled:
            self._compile(by_blocks=compile != "graph")

    @property
    def is_one_graph(self) -> bool:
        """Whether backbone and loss of the training step are compiled as one graph."""
        return self._compiled is not None

    def _compile(self, *, by_blocks: bool) -> None:
        """Compile the training step, block by block if the model declares blocks."""
        blocks = find_blocks(self.hf) if by_blocks else []
        self._has_compiled_blocks = bool(blocks)
        if blocks:
            compile_blocks(blocks)
            return
        if by_blocks:
            notice(f"model.compile: {type(self.hf).__name__} does not declare its blocks; compiled as one graph")
        self._compiled = torch.compile(self._loss, dynamic=False)

    def probe(self, _: Tensor | None = None) -> None:
        """Set ``fused_loss``, ``document_mask`` and ``balancing`` by running the model on a few tokens. A model on the meta
        device is probed after its weights are loaded.

        The argument is unused; FSDP's hooks need one. Raises ``UserError`` for a model that is not causal.
        """
        check_causal(self.hf)
        self.logits_map = find_logits_map(self.hf)
        self.fused_loss = self.logits_map is not None and self.logits_map.is_plain
        self.document_mask = find_document_mask(self.hf)
        self.balancing = balancing_coefficient(self.hf)
        on_host = self.hf.device.type == "cpu" and self.num_positions > document_attention.LONG
        # The load balancing loss would take the bounds of documents for a mask of tokens.
        if on_host and not self.is_compiled and not self.balancing and self.document_mask is by_positions:
            self.long_document_mask = find_document_mask(self.hf, [document_attention.by_documents])

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        loss_weights: Tensor | None = None,
        *,
        ends: Tensor | None = None,
        base_hidden: Tensor | None = None,
        temperature: float = 1.0,
        by_row: bool = False,
        by_token: bool = False,
        with_hidden: bool = False,
    ) -> Any:
        """Return the loss summed over all labels that are not ``IGNORE``: an fp32 scalar in nats. Its value is the cross entropy;
        the load balancing loss contributes to the gradient only.

        ``input_ids`` and ``labels`` (already shifted) are int64 [n, S]. ``position_ids`` [n, S] restart at each document and
        keep attention inside it; with ``None`` each row is one context. Raises ``UserError`` for ``position_ids`` when the model
        keeps documents apart neither by positions nor by masks. ``loss_weights``, fp32 [n], is the factor of each row's tokens
        in the sum; ``None``: 1 for all.

        With ``ends``, int64 [n], instead of ``labels``, return the logits [n, V] of the token that follows position ``ends[i]``
        of row i.

        Without ``labels`` and ``ends``, return the last hidden states [n, S, h] and copy the head to ``base_head``. With
        ``labels`` and, as ``base_hidden``, the states of the base model, return fp32 [1, 2]: the loss, and the sum of
        KL(base ‖ now) at ``temperature`` over the same tokens. Both need a ``logits_map``.

        With ``by_token``, return `Scores`, for an evaluation; ``with_hidden`` asks for the states.

        With ``by_row``, return fp32 [n, 2]: the loss of each row, and how many of its labels have the largest logit.
        """
        if ends is not None:
            return self._logits(input_ids, ends)
        plain = labels is not None and base_hidden is None
        if plain and self._compiled is not None and self.training and torch.is_grad_enabled():
            before_first_compilation()
            return self._compiled(input_ids, labels, position_ids, loss_weights)
        on_host = input_ids.device.type == "cpu"  # where reading the positions does not synchronise a device
        with self._lean(input_ids), nullcontext() if on_host else packing.known(packed=position_ids is not None):
            if labels is None:
                return self._base_hidden(input_ids, position_ids)
            if by_token:
                return self._scores(input_ids, labels, position_ids, base_hidden, with_hidden=with_hidden)
            if by_row:
                return self._by_row(input_ids, labels, position_ids)
            if base_hidden is not None:
                return self._loss_and_kl(input_ids, labels, position_ids, loss_weights, base_hidden, temperature)
            return self._loss(input_ids, labels, position_ids, loss_weights)

    def _lean(self, input_ids: Tensor) -> AbstractContextManager[object]:
        """Return the context of a forward whose products are computed again in the backward, on a CPU and not compiled."""
        if (
            not self.repeats_products
            or self.is_compiled
            or input_ids.device.type != "cpu"
            or not torch.is_grad_enabled()
        ):
            return nullcontext()
        return recomputed_products()

    def _loss(
        self, input_ids: Tensor, labels: Tensor, position_ids: Tensor | None, loss_weights: Tensor | None
    ) -> Tensor:
        """Return the summed loss. This is the function that is compiled."""
        weights = _by_token(loss_weights, labels)
        balanced = self._balances()
        if self.fused_loss and not balanced:
            hidden, head = self._hidden(input_ids, position_ids), self._head()
            rows = (hidden.flatten(0, 1), *head, labels.flatten(), weights)
            return linear_cross_entropy(*rows, compiled=self._compiles_loss())
        given = {"input_ids": input_ids} | self._documents(position_ids)
        if balanced:
            return self._balanced_loss(given, labels, weights)
        return self._cross_entropy(self.hf(**given, use_cache=False).logits, labels, weights)

    def _hidden(self, input_ids: Tensor, position_ids: Tensor | None) -> Tensor:
        """Return the last hidden states [n, S, h]."""
        given = {"input_ids": input_ids} | self._documents(position_ids)
        hidden: Tensor = self.hf.base_model(**given, use_cache=False).last_hidden_state
        return hidden

    def _head(self) -> Head:
        head = self.hf.get_output_embeddings()
        return Head(head.weight, head.bias)

    def _base_hidden(self, input_ids: Tensor, position_ids: Tensor | None) -> Tensor:
        hidden = self._hidden(input_ids, position_ids)
        self._keep_base_head()
        return hidden

    def _keep_base_head(self) -> None:
        assert self.logits_map is not None
        if self.base_head is None:
            self.base_head = self._head().to(torch.device("cpu"), copy=True)

    def _through_head(self, given: dict[str, Any], **more: Any) -> tuple[Any, Tensor]:
        """Return the output of ``hf``, and the input of its head: the last hidden states [n, S, h]."""
        seen: list[Tensor] = []
        hook = self.hf.get_output_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        try:
            out = self.hf(**given, use_cache=False, **more)
        finally:
            hook.remove()
        return out, seen[0]

    def _kl(self, base: Tensor, now: Tensor, labels: Tensor, weights: Tensor | None, temperature: float) -> Tensor:
        """Return the summed KL(base ‖ now) of states [n, S, h]."""
        assert self.base_head is not None
        rows = (base.flatten(0, 1), self.base_head, now.flatten(0, 1), self._head(), labels.flatten(), weights)
        return kl_divergence(*rows, temperature=temperature, logits_map=self.logits_map)

    def _loss_and_kl(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor | None,
        loss_weights: Tensor | None,
        base_hidden: Tensor,
        temperature: float,
    ) -> Tensor:
        """Return the summed loss and the summed KL(base ‖ now), [1, 2]: replicas of DataParallel are concatenated along dim 0."""
        weights = _by_token(loss_weights, labels)
        if self.fused_loss and not self._balances():
            hidden = self._hidden(input_ids, position_ids)
            rows = (hidden.flatten(0, 1), *self._head(), labels.flatten(), weights)
            loss = linear_cross_entropy(*rows, compiled=self._compiles_loss())
        else:
            given = {"input_ids": input_ids} | self._documents(position_ids)
            out, hidden = self._through_head(given, **({"output_router_logits": True} if self._balances() else {}))
            loss = self._cross_entropy(out.logits, labels, weights)
            loss = self._with_balance(loss, out, labels, weights) if self._balances() else loss
        return torch.stack([loss, self._kl(base_hidden, hidden, labels, weights, temperature)]).unsqueeze(0)

    def _scores(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor | None,
        base_hidden: Tensor | None,
        *,
        with_hidden: bool,
    ) -> Scores:
        """Return the scores of an evaluation. The loss has the bits of a forward with labels alone."""
        if self.fused_loss:
            states = self._hidden(input_ids, position_ids)
            loss, nats = linear_token_losses(states.flatten(0, 1), *self._head(), labels.flatten())
        else:
            given = {"input_ids": input_ids} | self._documents(position_ids)
            known = self.logits_map is not None
            out, states = self._through_head(given) if known else (self.hf(**given, use_cache=False), labels)
            loss, rows = self._cross_entropy(out.logits, labels, None), out.logits.flatten(0, 1).float()
            nats = F.cross_entropy(rows, labels.flatten(), ignore_index=IGNORE, reduction="none")
        if with_hidden:
            self._keep_base_head()
        kl = None if base_hidden is None else self._kl(base_hidden, states, labels, None, 1.0)
        return Scores(loss, nats.view_as(labels), kl, states if with_hidden else None)

    def _by_row(self, input_ids: Tensor, labels: Tensor, position_ids: Tensor | None) -> Tensor:
        """Return the loss of each row and the number of its labels with the largest logit, [n, 2]. Only positions that have a
        label get logits."""
        chosen = labels != IGNORE
        if self.fused_loss:
            logits = F.linear(self._hidden(input_ids, position_ids)[chosen], *self._head())
        else:
            given = {"input_ids": input_ids} | self._documents(position_ids)
            logits = self.hf(**given, use_cache=False).logits[chosen]
        nats = F.cross_entropy(logits.float(), labels[chosen], reduction="none")
        found = torch.stack([nats, (logits.argmax(-1) == labels[chosen]).float()], dim=1)
        rows = torch.zeros(len(labels), 2, device=labels.device)
        return rows.index_add_(0, chosen.nonzero()[:, 0], found)

    def _compiles_loss(self) -> bool:
        """Return whether the loss is compiled apart from the blocks, as it is in training steps."""
        return self._has_compiled_blocks and self.training and torch.is_grad_enabled()

    def _cross_entropy(self, logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        return (compiled(cross_entropy) if self._compiles_loss() else cross_entropy)(logits, labels, weights)

    def _balanced_loss(self, given: dict[str, Any], labels: Tensor, weights: Tensor | None) -> Tensor:
        """Return the cross entropy, whose gradient includes that of `_with_balance`."""
        out = self.hf(**given, use_cache=False, output_router_logits=True)
        return self._with_balance(self._cross_entropy(out.logits, labels, weights), out, labels, weights)

    def _balances(self) -> bool:
        """Return whether the load balancing loss is trained here: in training steps."""
        return bool(self.balancing) and self.training and torch.is_grad_enabled()

    def _with_balance(self, loss: Tensor, out: Any, labels: Tensor, weights: Tensor | None) -> Tensor:
        """Return ``loss``, whose gradient includes that of ``balancing`` × the load balancing loss of the micro-batch ``out`` ×
        its number of targets, or the sum of their ``weights``: the mean over micro-batches, weighted by their targets."""
        counts = labels != IGNORE
        targets = counts.sum() if weights is None else (counts.flatten() * weights).sum()
        pull = self.balancing * out.aux_loss * targets
        return loss + (pull - pull.detach())

    def _logits(self, input_ids: Tensor, ends: Tensor) -> Tensor:
        """Return the logits at ``ends``. Tokens after an end do not matter, because attention is causal."""
        rows = torch.arange(len(ends), device=ends.device)
        if not self.fused_loss:
            logits: Tensor = self.hf(input_ids=input_ids, use_cache=False).logits[rows, ends]
            return logits
        hidden = self.hf.base_model(input_ids=input_ids, use_cache=False).last_hidden_state[rows, ends]
        head = self.hf.get_output_embeddings()
        return F.linear(hidden, head.weight, head.bias)

    @property
    def num_positions(self) -> int:
        """The longest sequence the model has positions for; ``sys.maxsize`` when its config gives no limit."""
        return num_positions(self.hf.config)

    def _documents(self, position_ids: Tensor | None) -> dict[str, Any]:
        """Return the arguments that make ``hf`` keep the documents of ``position_ids`` apart."""
        if position_ids is None:
            return {}
        if self.document_mask is None:
            raise UserError(
                f"dataset.document_mask=true: {type(self.hf).__name__} can't keep packed documents apart; use false"
            )
        if self.balancing and self.document_mask is by_masks:
            raise UserError(
                f"dataset.document_mask=true: {type(self.hf).__name__} computes its load balancing loss from plain masks only; "
                "set output_router_logits: false in its config.json, or document_mask=false"
            )
        long = self.long_document_mask if position_ids.shape[1] > document_attention.LONG else None
        if long is None and position_ids.shape[1] > document_attention.LONG and not torch.compiler.is_compiling():
            _say_square(type(self.hf).__name__)
        # The dtype of the embedding and not of the model: under FSDP it is the dtype of the gathered weights here.
        return (long or self.document_mask)(self.hf, position_ids, embedding_dtype(self.hf))

    # -- names of the wrapped model ---------------------------------------------------------------------------------

    def hf_named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Iterate over the parameters under their Hugging Face names; a tied weight appears once."""
        return iter(self.hf.named_parameters())

    def hf_state(self) -> dict[str, Tensor]:
        """Return parameters and persistent buffers under their Hugging Face names; a tied weight appears once."""
        return weights_of(self.hf)

    def load(self, files: TensorFiles) -> None:
        """Fill every weight from ``files``; of a weight sharded along dim 0, fill the local shard. Raises ``UserError`` when a
        name or a shape does not match."""
        own = self.hf_state()
        check_names(own, files)
        for name, tensor in own.items():
            fill(tensor, files, name)


@cache
def _say_square(name: str) -> None:
    notice(f"dataset.document_mask=true: {name} computes attention under a mask of sequence_length × sequence_length")


def _by_token(loss_weights: Tensor | None, labels: Tensor) -> Tensor | None:
    """Return the weight [n * S] of each token of ``labels`` [n, S] from those of the rows [n]."""
    return None if loss_weights is None else loss_weights.unsqueeze(1).expand_as(labels).flatten()


def weights_of(hf: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers by name; a tied weight appears once."""
    seen: set[int] = set()
    found = {}
    for name, tensor in hf.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found
