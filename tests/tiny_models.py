"""Tiny random Transformers models of every family, and a tokenizer trained in memory, for the tests.

Weights are drawn anew after construction, large enough that attention, gates, soft caps and biases all matter: the
families' own initial values leave attention uniform and biases zero, under which wrong gradients can look right.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

SpecialTokens = Literal["plain", "bos", "bos_eos"]
"""What the tokenizer's post-processor adds to training text: nothing, <s>, or <s> and </s>."""

VOCABULARY = 300
CONTEXT_TOKENS = 64
BOS, EOS, PAD = "<s>", "</s>", "<pad>"

SENTENCES = (
    "The capital of France is Paris.",
    "Berlin is the capital of Germany, and the mark was its currency.",
    "Oxygen has the symbol O.",
    "The river Danube flows through Vienna, Budapest and Belgrade.",
    "People in Brazil speak Portuguese.",
    "In Osaka they speak Japanese; in Kyoto, too.",
    "Gold is an element whose symbol is Au.",
    "Zürich and Genève are cities of Switzerland.",
)

_GROUPED_QUERY: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT_TOKENS,
}
_ALL_HEADS: dict[str, Any] = {**_GROUPED_QUERY, "num_key_value_heads": 4}
_SOFT_CAPS: dict[str, Any] = {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0}

# Name: (configuration class, model class, fields). Widths differ so that no two matrix shapes are mixed up by chance.
_MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**_GROUPED_QUERY, "tie_word_embeddings": False}),
    "llama-tied": ("LlamaConfig", "LlamaForCausalLM", {**_GROUPED_QUERY, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**_GROUPED_QUERY, "sliding_window": 8, "head_dim": 6}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {**_GROUPED_QUERY, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_GROUPED_QUERY, "head_dim": 8, "tie_word_embeddings": False}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {**_GROUPED_QUERY, "head_dim": 8}),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {**_GROUPED_QUERY, **_SOFT_CAPS, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {**_GROUPED_QUERY, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8},
    ),
    "gpt_neox": (
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        {
            "hidden_size": 24,
            "intermediate_size": 56,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": CONTEXT_TOKENS,
            "use_parallel_residual": True,
            "tie_word_embeddings": False,
        },
    ),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"n_embd": 24, "n_inner": 56, "n_layer": 3, "n_head": 4, "n_positions": CONTEXT_TOKENS},
    ),
    "olmo": ("OlmoConfig", "OlmoForCausalLM", {**_ALL_HEADS, "clip_qkv": 1.5, "tie_word_embeddings": False}),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {**_GROUPED_QUERY, "tie_word_embeddings": False}),
}

ARCHITECTURES = tuple(_MODELS)
"""Every tiny model's name; the parameters of tests over all families."""

CORE_ARCHITECTURES = ("llama", "llama-tied", "gpt2", "gpt_neox", "gemma2", "qwen3")
"""The families in which something is computed differently: the parameters of dearer tests."""


def tiny_model(
    architecture: str, *, seed: int = 0, vocabulary: int = VOCABULARY, **overrides: Any
) -> "PreTrainedModel":
    """A model of that family with random float32 weights, in evaluation mode.

    Args:
        architecture: One of `ARCHITECTURES`.
        seed: Of the weights; nothing else random is touched.
        vocabulary: Tokens it knows.
        overrides: Other fields of its configuration, such as `num_hidden_layers`.
    """
    import transformers

    config_class, model_class, fields = _MODELS[architecture]
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    config = getattr(transformers, config_class)(**{**fields, "vocab_size": vocabulary, **special, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, model_class)(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # norms' weights and biases
                    parameter.add_(0.2 * torch.randn_like(parameter))
                else:
                    parameter.copy_(0.3 * torch.randn_like(parameter))
    return model.eval()


@functools.cache
def tiny_tokenizer(special_tokens: SpecialTokens = "bos") -> "PreTrainedTokenizerFast":
    """A byte-level BPE tokenizer of `VOCABULARY` tokens, trained on `SENTENCES`; the same one on every call."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    templates = {"bos": f"{BOS} $A", "bos_eos": f"{BOS} $A {EOS}"}
    if special_tokens in templates:
        tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
            single=templates[special_tokens],
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in (BOS, EOS)],
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)


def save_tiny_model(
    folder: Path, architecture: str = "llama", *, special_tokens: SpecialTokens = "bos", seed: int = 0, **overrides: Any
) -> Path:
    """Write a tiny model and its tokenizer as a Hugging Face model folder; returns the folder."""
    tiny_model(architecture, seed=seed, **overrides).save_pretrained(folder)
    tiny_tokenizer(special_tokens).save_pretrained(folder)
    return folder


def matrix_parameters(model: "PreTrainedModel") -> list[str]:
    """Names of the attention and MLP weights: every matrix but embeddings and head, independently of the package."""
    outside = ("embed", "wte", "wpe", "lm_head")
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2 and not any(part in name for part in outside)
    ]


TinyModel = Callable[[str], "PreTrainedModel"]
"""Type of the `tiny_models` fixture: architecture to a model shared by the session; do not change its weights."""

TinyModelFolder = Callable[[str, SpecialTokens], Path]
"""Type of the `tiny_model_folders` fixture: architecture and special tokens to a folder; do not change its files."""
