"""How many floating-point operations a model needs for a token of training: what MFU is measured by.

The convention is that of Chowdhery et al. 2022 (PaLM, arXiv:2204.02311, appendix B): 6 for each weight of a matrix product,
the head's too and embeddings not (2 forward, 4 backward), and 12 · layers · width · length for attention, where width is
heads × their size. Softmax, norms and what is computed a second time (activation checkpointing) do not count. Causal
attention needs half of its products, so ``causal`` counts half; ``full`` counts all, as a mask that is no shortcut does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

# Dense decoders without anything but this in them: tests count the operations of every one. Another may hide a product
# that no module shows, or skip one that it has; its number would be a guess.
COUNTED = {
    "gpt2",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gpt_neox",
    "opt",
    "phi",
    "bloom",
    "gemma2",
    "cohere",
    "granite",
}


@dataclass(frozen=True, slots=True)
class Flops:
    """Operations of a token's training, forward and backward; ``None`` both where ``unknown`` says why."""

    causal: float | None = None
    full: float | None = None
    unknown: str | None = None

    def facts(self) -> dict[str, Any]:
        """For run.json."""
        known = {"flops_per_token": self.causal, "flops_per_token_full_attention": self.full}
        return known if self.unknown is None else known | {"flops_unknown": self.unknown}


def flops_per_token(hf: Any, sequence_length: int) -> Flops:
    """Of ``hf``, a causal LM of transformers, whole or sharded, on sequences of ``sequence_length``.

    A document mask leaves out attention across borders; packed sequences are counted whole nevertheless, as the kernels
    compute them.
    """
    config = hf.config
    if config.model_type not in COUNTED:
        return Flops(unknown=f"the operations of a {config.model_type} are not counted")
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window is not None and window < sequence_length:
        return Flops(unknown=f"its attention sees {window} of the {sequence_length} tokens of a sequence")
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 12.0 * config.num_hidden_layers * config.num_attention_heads * head_size * sequence_length
    products = 6.0 * sum(matrix_sizes(hf))
    return Flops(causal=products + attention / 2, full=products + attention)


def matrix_sizes(hf: nn.Module) -> Iterator[int]:
    """The number of weights in each matrix that every token is multiplied by. A shard knows its whole module's sizes."""
    for module in hf.modules():
        if isinstance(module, nn.Linear):
            yield module.in_features * module.out_features
        elif isinstance(module, Conv1D):
            yield module.nx * module.nf
