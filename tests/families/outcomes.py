"""What trackstar does with each causal family of the installed Transformers; the rest works without patterns.

The sweep test checks every entry, and docs/families.md is generated from them.
"""

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A family that is refused.

    Attributes:
        reason: The reason in a few words, for people.
        message: A part of the line that the user reads.
        attention: An `attention_pattern` with which the family works; None if no pattern helps.
        mlp: The `mlp_pattern` beside it.
    """

    reason: str
    message: str
    attention: str | None = None
    mlp: str | None = None


_NOT_CAUSAL = Refusal(reason="predicts from later tokens, too", message="is not causal: a later token changes")
_LLAMA4 = Refusal(
    reason="its routed experts compute in a way of their own",
    message="match no known pattern of attention or MLP matrices (model.layers.*.feed_forward.experts.gate_up_proj, ",
    attention=r"model\.layers\.(\d+)\.self_attn\..+",
    mlp=r"model\.layers\.(\d+)\.feed_forward\.(?:shared_expert\..+|(?:up|gate|down)_proj)",
)

REFUSED: dict[str, Refusal] = {
    "cpmant": _NOT_CAUSAL,
    "dbrx": Refusal(
        reason="its experts compute in a way of their own",
        message="match no known pattern of attention or MLP matrices (transformer.blocks.*.ffn.experts.mlp.w1, ",
        attention=r".+\.blocks\.(\d+)\..+\.(?:Wqkv|out_proj)",
        mlp=r".+\.blocks\.(\d+)\.ffn\.router\.layer",
    ),
    "deepseek_v4": Refusal(
        reason="its attention's output is a product by groups",
        message="self_attn.o_a_proj (DeepseekV4GroupedLinear) computes something else than the product with its weight",
        attention=r".+\.layers\.(\d+)\.self_attn\.(?:q_a_proj|q_b_proj|kv_proj|o_b_proj)",
        mlp=r".+\.layers\.(\d+)\.mlp\..+",
    ),
    "inkling_text": Refusal(
        reason="its shared experts compute in a way of their own",
        message="match no known pattern of attention or MLP matrices (model.layers.*.mlp.shared_experts.gate_proj, ",
        attention=r".+\.layers\.(\d+)\.self_attn\.[^.]+_proj",
        mlp=r".+\.layers\.(\d+)\.mlp\.experts\..+",
    ),
    "jetmoe": Refusal(
        reason="its experts compute in a way of their own",
        message="match no known pattern of attention or MLP matrices (model.layers.*.mlp.input_linear.weight, ",
        attention=r".+\.layers\.(\d+)\.self_attention\.kv_proj",
        mlp=r".+\.layers\.(\d+)\.mlp\.router\.layer",
    ),
    "llama4": _LLAMA4,
    "llama4_text": _LLAMA4,
    "longcat_flash": Refusal(
        reason="its experts compute in a way of their own",
        message="match no known pattern of attention or MLP matrices (model.layers.*.mlp.experts.gate_up_proj, ",
        attention=r".+\.layers\.(\d+)\.self_attn\..+",
        mlp=r".+\.layers\.(\d+)\.mlps\..+",
    ),
    "prophetnet": Refusal(reason="predicts several tokens at once", message="expected one vector per token"),
    "reformer": Refusal(
        reason="computes its own backward pass", message="no gradient passes through ReformerModelWithLMHead"
    ),
    "xlm": _NOT_CAUSAL,
    "xlnet": _NOT_CAUSAL,
}

NOT_BUILT: dict[str, str] = {
    "gemma3n": "its vision tower needs timm, which the tests do not install",
    "gemma4_assistant": "drafts for another model, whose cache it reads",
    "gemma4_unified_assistant": "drafts for another model, whose cache it reads",
    "musicgen": "generates sound from the configurations of three models",
    "musicgen_melody": "generates sound from the configurations of three models",
}
"""Families that no test builds, and why. A test fails once one can be built."""

SINGLE_PRECISION = frozenset({"xglm"})
"""Families whose code cannot run in float64."""

FAST = (
    "llama", "gpt2", "gemma2", "opt", "minicpm3", "bert", "roberta", "bloom", "mixtral", "gpt_oss", "qwen3_moe",
    "deepseek_v3", "granitemoe", "gemma3", "gemma4", "qwen3_5_text", "zamba2", "jamba", "recurrent_gemma", "mamba",
    "xglm", "cohere", "olmoe", "hrm_text", "zaya", "nemotron_h", *REFUSED, *NOT_BUILT,
)  # fmt: skip
"""Families of the fast suite: one for each way of computing, and all that do not work."""
