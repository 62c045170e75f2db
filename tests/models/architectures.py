"""A tiny model of every causal architecture in the installed transformers, from its own default config with small numbers."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ALL = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY, WINDOW = 97, 8
# Whatever a config calls it: the small number that each key gets.
SMALL: dict[str, Any] = {
    key: value
    for value, keys in {
        VOCABULARY: "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size encoder_hash_byte_group_vocab",
        128: """max_position_embeddings n_positions n_ctx max_seq_len model_max_length max_target_positions context_length
             original_max_position_embeddings max_source_positions position_bias_max_distance""",
        64: "d_inner emb_hidden",
        32: """index_n_heads
            hidden_size d_model n_embd emb_dim embedding_dim embedding_size attention_hidden_size lru_width dim_model_base
            word_embed_proj_dim input_embedding_size output_embedding_size ple_embed_dim q_lora_rank kv_lora_rank mamba_d_ssm""",
        48: """intermediate_size moe_intermediate_size ffn_dim dff dim_ff decoder_ffn_dim encoder_ffn_dim ffn_hidden_size
            feed_forward_size shared_expert_intermediate_size shared_intermediate_size intermediate_size_mlp
            shared_experts_intermediate_size dense_intermediate_size moe_shared_expert_intermediate_size
            expert_ffn_hidden_size""",
        WINDOW: "sliding_window attention_window_size attention_chunk_size window_size local_attention sliding_window_size",
        16: "router_hidden_size gated_norm_rank o_lora_rank hc_lowrank mamba_d_state state_size ssm_state_size mamba_dt_rank",
        8: """head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim index_head_dim linear_key_head_dim linear_value_head_dim
           linear_head_dim hidden_size_per_layer_input laurel_rank d_rel swa_head_dim kv_channels mamba_d_head mamba_head_dim
           dim_head d_head index_topk adapter_rank chunk_size mamba_chunk_size time_step_rank attention_head_size
           ngram_vocab_size_base make_ngram_vocab_size_divisible_by mamba_headdim query_pre_attn_scalar rotary_dim block_size""",
        4: """num_attention_heads decoder_attention_heads encoder_attention_heads n_head n_heads num_heads attention_heads
           linear_num_heads linear_num_value_heads swa_num_attention_heads num_decoder_attention_heads
           num_encoder_attention_heads n_mamba_heads num_experts n_routed_experts num_local_experts moe_num_experts
           split_ngram_parts o_groups mamba_num_heads num_query_groups num_random_blocks""",
        2: """num_hidden_layers decoder_layers encoder_layers n_layer n_layers num_layers num_decoder_layers num_encoder_layers
           num_blocks num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads num_experts_per_tok moe_k
           moe_topk num_experts_per_token num_layers_per_stack heads_per_ngram zero_expert_num layer_group_size""",
        1: """n_group topk_group num_expert_group n_groups mamba_n_groups mamba_ngroups n_shared_experts
           num_shared_experts moe_num_shared_experts first_k_dense_replace global_attn_every_n_layers""",
        0: "num_nextn_predict_layers num_kv_shared_layers num_dense_layers eos_token_id bos_token_id pad_token_id seed",
    }.items()
    for key in keys.split()
}
DROPOUT = ("dropout", "pdrop", "dropout_p")
LATENT = {"num_key_value_heads": 4}  # keys and values come from one latent vector for all heads
# What an architecture asks for besides.
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        """axk1 axk2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa longcat_flash minicpm3 youtu
        dots3_note_text bailing_hybrid kimi_linear""".split(),
        LATENT,
    ),
    "bamba": {"mamba_n_heads": 8},
    "deepseek_v2": LATENT | {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots1": {
        "num_experts_per_tok": 2,
        "n_routed_experts": 4,
        "moe_intermediate_size": 48,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "falcon_h1": {"mamba_n_heads": 4},
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 16]},
    "zamba2": {"mamba_headdim": 16, "n_mamba_heads": 4, "attention_hidden_size": 64, "attention_head_dim": 16},
    "zaya": {"num_experts_per_tok": 1},
}
# Not text alone, or not to be had small.
LEFT_OUT = {
    **dict.fromkeys(
        """gemma3 gemma3n gemma4 gemma4_unified git got_ocr2 mllama moshi moss_transcribe_diarize musicgen musicgen_melody
        fuyu phi4_multimodal""".split(),
        "a model of pictures or sound, too",
    ),
    **dict.fromkeys("cohere_compass_text dots3_note".split(), "its default config does not hold what its code reads"),
    **dict.fromkeys("qwen4_exp qwen4_exp_text zamba".split(), "its layers depend on each other in sizes of their own"),
    "dbrx": "transformers can't build it from a config",
    "blt": "its table of bytes has a size of its own",
    "gemma4_assistant": "needs a second model",
    "gemma4_unified_assistant": "needs a second model",
    "xmod": "needs to be told a language",
}

NAMES = [name for name in ALL if name not in LEFT_OUT]


def small(config: dict[str, Any]) -> dict[str, Any]:
    """The values of a default config, shrunk; lists with an entry for each layer keep two of them, of different kinds."""
    layers = next(
        (config[k] for k in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if config.get(k)), None
    )
    result = {}
    for key, value in config.items():
        if key in SMALL and isinstance(value, int) and not isinstance(value, bool):
            result[key] = SMALL[key]
        elif key.endswith(DROPOUT) and isinstance(value, float):
            result[key] = 0.0
        elif isinstance(value, list) and layers and len(value) == layers and layers > 2:
            kinds = list(dict.fromkeys(map(str, value)))
            result[key] = [value[0], next((v for v in value if str(v) == kinds[-1]), value[-1])]
        elif isinstance(value, dict) and "vocab_size" in value:
            result[key] = small(value)
    if (
        "layer_types" in result
        and len(set(result["layer_types"])) == 1
        and "sliding_attention" in result["layer_types"]
    ):
        result["layer_types"] = ["sliding_attention", "full_attention"]
    return result


def tiny(name: str, *, attention: str = "sdpa", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """The model with random weights, in train mode; eager where it has no ``attention``."""
    config = CONFIG_MAPPING[name](**(small(CONFIG_MAPPING[name]().to_dict()) | OWN.get(name, {}) | changes))
    torch.manual_seed(0)
    try:
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype).train()
    except ValueError as error:
        if "not support an attention implementation through" not in str(error):
            raise
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype).train()
