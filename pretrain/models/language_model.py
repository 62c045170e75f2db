"""A Hugging Face causal LM with the loss inside its forward, so that whatever wraps the module wraps the head's weight too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.batch import IGNORE
from pretrain.models.loss import linear_cross_entropy


class LanguageModel(nn.Module):
    """``hf``: the wrapped model. ``lean``: its logits are just ``head(last hidden state)``, found out on a probe, so that
    the loss can be worked out without them; models that cap or scale their logits go through their own head.

    Dropout is as the model's config has it. Auxiliary losses (a mixture of experts' load balancing) are not added.
    """

    def __init__(self, hf: Any) -> None:
        super().__init__()
        self.hf = hf
        hf.config.use_cache = False
        self.lean = has_plain_head(hf)

    def forward(self, input_ids: Tensor, labels: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """The loss summed over all labels that are not ``IGNORE``: nats, an fp32 scalar.

        ``input_ids``, ``labels`` (already shifted) int64 [n, S]. ``position_ids`` [n, S] restart at each document and keep
        attention inside it; ``None``: one sequence, one context.
        """
        positions = {} if position_ids is None else {"position_ids": position_ids}
        if not self.lean:
            logits = self.hf(input_ids=input_ids, use_cache=False, **positions).logits
            return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, reduction="sum")
        hidden = self.hf.base_model(input_ids=input_ids, use_cache=False, **positions).last_hidden_state
        head = self.hf.get_output_embeddings()
        return linear_cross_entropy(hidden.flatten(0, 1), head.weight, head.bias, labels.flatten())

    # -- names of the wrapped model ---------------------------------------------------------------------------------

    def hf_named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters under their Hugging Face names; a tied weight comes once."""
        return iter(self.hf.named_parameters())

    def hf_state_dict(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers under their Hugging Face names; a tied weight is there once."""
        seen: set[int] = set()
        state = {}
        for name, tensor in self.hf.state_dict(keep_vars=True).items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                state[name] = tensor.detach()
        return state

    def load_hf_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The reverse. Raises ``RuntimeError`` when a name or a shape does not fit."""
        own = self.hf_state_dict()
        if own.keys() != state.keys():
            raise RuntimeError(f"weights do not fit: {sorted(own.keys() ^ state.keys())[:5]} on one side only")
        with torch.no_grad():
            for name, tensor in own.items():
                if tensor.shape != state[name].shape:
                    raise RuntimeError(f"{name}: shape {tuple(state[name].shape)}, the model has {tuple(tensor.shape)}")
                tensor.copy_(state[name])


@torch.no_grad()
def has_plain_head(hf: Any) -> bool:
    """Whether the logits are the output embedding applied to the last hidden state, seen on four tokens.

    Asked of the numbers and not of a list of architectures: soft-capping, logit scales and extra projections all show.
    """
    head = hf.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.weight.is_meta:
        return False
    training = hf.training
    hf.eval()
    try:
        ids = torch.arange(4, device=head.weight.device).unsqueeze(0) % head.weight.shape[0]
        logits = hf(input_ids=ids, use_cache=False).logits
        hidden = hf.base_model(input_ids=ids, use_cache=False).last_hidden_state
        if hidden.shape[-1] != head.weight.shape[-1]:
            return False
        return bool(torch.allclose(logits, head(hidden), rtol=1e-4, atol=1e-5))
    finally:
        hf.train(training)
