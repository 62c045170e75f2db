"""The number of floating-point operations per training token, from which MFU is computed.

The convention is that of Chowdhery et al. 2022 (PaLM, arXiv:2204.02311, appendix B): 6 operations (2 forward, 4 backward) per
weight that takes part in a matmul, including the head and excluding embeddings, plus 12 · layers · width · length for
attention, where width is heads × head size. Softmax, norms and recomputation (activation checkpointing) are not counted.
Causal attention needs half of its matmuls, so ``causal`` counts half of them; ``full`` counts all, as a kernel does that
does not exploit the mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

# Dense decoders that consist of these matmuls only; tests count the operations of each. Another architecture may have a matmul
# outside of a module, or skip one that it has, so its number would be a guess.
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
    """Operations per training token, forward and backward. Both are ``None`` when ``unknown`` gives the reason."""

    causal: float | None = None
    full: float | None = None
    unknown: str | None = None

    def facts(self) -> dict[str, Any]:
        """Return the entries of run.json."""
        known = {"flops_per_token": self.causal, "flops_per_token_full_attention": self.full}
        return known if self.unknown is None else known | {"flops_unknown": self.unknown}


def flops_per_token(hf: Any, sequence_length: int) -> Flops:
    """Return the operations per token of ``hf``, a full or sharded causal LM of transformers, on sequences of
    ``sequence_length`` tokens.

    Packed sequences are counted as if attention crossed the document boundaries, as the kernels compute them.
    """
    config = hf.config
    if config.model_type not in COUNTED:
        return Flops(unknown=f"the operations of a {config.model_type} are not counted")
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window is not None and window < sequence_length:
        return Flops(unknown=f"its attention sees {window} of the {sequence_length} tokens of a sequence")
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 12.0 * config.num_hidden_layers * config.num_attention_heads * head_size * sequence_length
    matmuls = 6.0 * sum(matrix_sizes(hf))
    return Flops(causal=matmuls + attention / 2, full=matmuls + attention)


def matrix_sizes(hf: nn.Module) -> Iterator[int]:
    """Yield the number of weights of each matrix that every token is multiplied by. The sizes are read from the modules, so they
    are those of the full matrix under any sharding."""
    for module in hf.modules():
        if isinstance(module, nn.Linear):
            yield module.in_features * module.out_features
        elif isinstance(module, Conv1D):
            yield module.nx * module.nf
