"""Tiny configurations of every causal family of the installed Transformers: its defaults, with every size shrunk.

Sizes are found by the names that configurations give them. Families whose sizes depend on each other in their own
way have a row in `FIELDS`.
"""

import re
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

VOCABULARY = 96
CONTEXT_TOKENS = 64
LAYERS = 4

_SIZES: tuple[tuple[str, int], ...] = (
    (r"vocab_size|decoder_vocab_size|unpadded_vocab_size|vocab_size_per_layer_input", VOCABULARY),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|context_length", CONTEXT_TOKENS),
    (r"original_max_position_embeddings|max_source_positions|max_target_positions|mem_len", CONTEXT_TOKENS),
    (r"(num_)?(hidden_|decoder_|encoder_|num_decoder_|num_encoder_)?layers|n_layers?|depth|num_blocks", LAYERS),
    (r"hidden_size|d_model|n_embd|emb_dim|embedding_dim|embedding_size|input_embedding_size|embed_dim", 32),
    (r"output_embedding_size|word_embed_proj_dim|attention_hidden_size|lru_width|backbone_hidden_size", 32),
    (r".*intermediate_size(_mlp)?|.*ffn_dim|d_inner|dff|d_ff|dim_ff|n_inner|.*ffn_hidden_size", 40),
    (r"mlp_dim|feed_forward_size", 40),
    (r".*num_attention_heads|.*num_heads|n_heads?|.*attention_heads|linear_num_key_heads", 4),
    (r"linear_num_value_heads", 4),
    (r".*num_key_value_heads|num_query_groups|num_kv_heads", 2),
    (r"v_head_dim|qk_nope_head_dim|qk_rope_head_dim|.*head_dim|d_head|d_kv|kv_channels|dim_head", 8),
    (r"attention_head_size|query_pre_attn_scalar|index_head_dim", 8),
    (r"qk_head_dim", 16),
    (r"num_local_experts|num_experts|n_routed_experts|moe_num_experts", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_top_k|moe_k|top_k_experts", 2),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts|n_group|topk_group|num_expert_group", 1),
    (r"kv_lora_rank|o_lora_rank", 16),
    (r"q_lora_rank", 12),
    (r".*sliding_window(_size)?|.*window_size|attention_chunk_size|local_attention(_window_len)?", 8),
    (r"index_topk|index_n_heads", 4),
    (r"rotary_dim", 4),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r".*chunk_size|chunk_length|.*attn_chunk_length", 8),
    (r"hidden_size_per_layer_input", 6),
    (r"num_kv_shared_layers", 0),
)
_TOKEN_ID = re.compile(r".*(_token_id|_token_index|_id|_index)")

_NO_HEAD_DIM: dict[str, Any] = {"head_dim": 8}

FIELDS: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16},
    "blt": {
        "encoder_hash_byte_group_vocab": 50,
        "encoder_config": {"hidden_size_global": 32},
        "decoder_config": {"hidden_size_global": 32},
    },
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        }
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "moe_intermediate_size": 40},
    "deepseek_v4": {"moe_intermediate_size": 256},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 40},
    "dots3_note": {
        "text_config": {"per_layer_config": {}, "num_key_value_heads": 4, "head_dim": 16},
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32, "per_layer_config": {}},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "dots3_note_text": {"per_layer_config": {}, "num_key_value_heads": 4, "head_dim": 16},
    "gemma3n_text": {"intermediate_size": 40},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "granitemoehybrid": {
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 16,
        "layer_types": ["mamba", "attention"] * 2,
        "shared_intermediate_size": 40,
    },
    "hunyuan_v1_dense": _NO_HEAD_DIM,
    "hunyuan_v1_moe": _NO_HEAD_DIM,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "full_attn_idxs": [1, 3]},
    "longcat_flash": {
        "expert_ffn_hidden_size": 40,
        "zero_expert_num": 2,
        "moe_topk": 2,
        "qk_head_dim": 16,
        "head_dim": 8,
    },
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2, "state_size": 16},
    "ministral": _NO_HEAD_DIM,
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "nemotron_h": {"n_groups": 2, "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 16},
    "qwen4_exp_text": {
        "head_dim": 8,
        "ple_embed_dim": 16,
        "heads_per_ngram": 2,
        "split_ngram_parts": 1,
        "ngram_vocab_size_base": 50,
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 8,
    },
    "qwen4_exp": {
        "text_config": {
            "head_dim": 8,
            "ple_embed_dim": 16,
            "heads_per_ngram": 2,
            "split_ngram_parts": 1,
            "ngram_vocab_size_base": 50,
            "indexer_n_heads": 4,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
            "hc_lowrank": 8,
        }
    },
    "reformer": {
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [8, 8],
        "is_decoder": True,
        "attn_layers": ["local", "lsh", "local", "lsh"],
        "num_buckets": 4,
    },
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 12,
        "mamba_dt_rank": 4,
        "mamba_d_state": 8,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "mamba_d_state": 8,
        "mamba_headdim": 8,
        "n_mamba_heads": 8,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "layer_types": ["mamba", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
    },
}
"""Fields of some families, which override the rules."""


def tiny_configuration(family: str) -> PretrainedConfig:
    """The family's configuration with tiny sizes."""
    configuration = CONFIG_MAPPING[family]()
    tiny = _shrunk(type(configuration), FIELDS.get(family, {}))
    if hasattr(tiny, "is_decoder"):
        tiny.is_decoder = True
    if family == "dbrx":  # its defaults lack what every checkpoint has
        tiny.attn_config.rope_theta, tiny.attn_config.clip_qkv = 10000.0, 8.0
    return tiny


def _shrunk(kind: type[PretrainedConfig], given: Mapping[str, Any]) -> PretrainedConfig:
    fields: dict[str, Any] = {}
    for name, value in kind().to_dict().items():
        sub_configurations: Any = kind.sub_configs
        if name in sub_configurations and isinstance(value, dict):
            of_sub = type(getattr(kind(), name))
            fields[name] = _shrunk(of_sub, given.get(name, {}))
        elif isinstance(value, int) and not isinstance(value, bool):
            size = _size(name, value)
            if size is not None:
                fields[name] = size
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:  # latent attention has as many keys as queries
        fields["num_key_value_heads"] = 4
    nested = {name for name, value in fields.items() if isinstance(value, PretrainedConfig)}
    fields.update({name: value for name, value in given.items() if name not in nested})
    return kind(**fields)


def _size(name: str, value: int) -> int | None:
    """The tiny size of a field, or None to leave it."""
    for pattern, size in _SIZES:
        if re.fullmatch(pattern, name):
            return min(size, value) if value > 0 else value
    if _TOKEN_ID.fullmatch(name) and value >= VOCABULARY:
        return VOCABULARY - 1 - sum(map(ord, name)) % 40
    return None
