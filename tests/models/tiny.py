"""Tiny models of several architectures, random weights, no files."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pretrain.models.causal_lm import Pretrained
from pretrain.models.model_factory import ModelFactory

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
GROUPED = SHAPE | {"num_key_value_heads": 2, "intermediate_size": 48}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": SHAPE | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "llama": GROUPED,
    "llama-tied-biased": GROUPED | {"model_type": "llama", "tie_word_embeddings": True, "attention_bias": True},
    "qwen2": GROUPED,
    "qwen3": GROUPED | {"head_dim": 8},
    "mistral": GROUPED | {"sliding_window": 16},
    "gpt_neox": SHAPE | {"intermediate_size": 48},
    "opt": SHAPE | {"ffn_dim": 48, "word_embed_proj_dim": 16, "dropout": 0.0, "attention_dropout": 0.0},
    "phi": SHAPE | {"intermediate_size": 48, "resid_pdrop": 0.0, "embd_pdrop": 0.0},  # its head has a bias
    "bloom": SHAPE | {"n_layer": 2, "n_head": 4, "hidden_dropout": 0.0, "attention_dropout": 0.0},
    "gemma2": GROUPED | {"head_dim": 8, "final_logit_softcapping": 30.0, "sliding_window": 16},
    "cohere": GROUPED | {"logit_scale": 0.0625},
    "granite": GROUPED | {"logits_scaling": 8.0},
    "mixtral": GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2},
}
EAGER_ONLY = {"gemma2", "bloom"}
NOT_LINEAR = {"gemma2", "cohere", "granite"}  # they cap or scale their logits


def tiny(name: str, *, attention: str = "sdpa", seed: int = 0, **changes: Any) -> Any:
    """The model in fp32 and train mode, with no dropout."""
    values = CONFIGS[name] | changes
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        values.get("model_type", name), **{k: v for k, v in values.items() if k != "model_type"}
    )
    attention = "eager" if name in EAGER_ONLY else attention
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).train()


def changed(model: Any, by: float = 0.05) -> Any:
    """The model in eval mode; every weight that is trained has other values, as training would give them."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += by * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def check_what_a_shard_reads(folder: Any, *transforms: Any, rows: Any = ((0, None), (1, 3))) -> dict[str, torch.Tensor]:
    """The transformed model of ``folder``, read in ranges of rows, has the values of the whole model, which are returned."""
    factory = ModelFactory(Pretrained(name_or_path=str(folder)), torch.float32, 3, transforms)
    built, meta = factory.build(torch.device("cpu")), factory.build_on_meta()
    files, state = factory.files(meta), built.hf_state()
    assert all(p.is_meta for p in meta.hf.parameters())
    assert files is not None
    assert files.keys() == state.keys() == meta.hf_state().keys()
    for name, tensor in state.items():
        assert files.shape(name) == tuple(tensor.shape)
        for start, stop in rows:
            assert torch.equal(files.read(name, start, stop), tensor.detach()[start:stop]), name
    return state
