"""Tiny models with PEFT adapters whose weights are drawn anew: a fresh adapter changes nothing."""

import warnings
from pathlib import Path
from typing import Any

import torch

from tiny_models import save_tiny_model, tiny_model, tiny_tokenizer

ATTENTION_AND_MLP = ["q_proj", "v_proj", "up_proj", "down_proj"]
GPT2 = ["c_attn", "c_fc", "c_proj"]


def lora(**options: Any) -> Any:
    """A LoRA configuration of rank 4."""
    from peft import LoraConfig

    return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ATTENTION_AND_MLP, **options})


def adapted(base: Any, configuration: Any, *, seed: int = 1) -> Any:
    """A `PeftModel` whose adapter is drawn anew, so that it changes what the model computes."""
    from peft import get_peft_model

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model = get_peft_model(base, configuration)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=draw))
    return model.eval()


def adapted_tiny_model(configuration: Any | None = None, *, architecture: str = "llama", **overrides: Any) -> Any:
    """A tiny model with an adapter in memory."""
    return adapted(tiny_model(architecture, **overrides), configuration or lora())


def save_adapter(folder: Path, configuration: Any | None = None, *, architecture: str = "llama") -> Path:
    """Write a tiny model to `folder`/base and an adapter of it to `folder`/adapter; returns the adapter's folder."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(save_tiny_model(folder / "base", architecture))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT takes a bias of B for a part of a matrix
        adapted(base, configuration or lora()).save_pretrained(folder / "adapter")
    return folder / "adapter"


def wrapped(module: Any, **options: Any) -> Any:
    """The model as trackstar sees it, with two layer blocks of each kind."""
    from trackstar.model.language_model import wrap_model

    return wrap_model(module, tiny_tokenizer("bos"), **{"layer_blocks": 2, **options})
