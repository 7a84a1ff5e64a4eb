"""The output head: from the last hidden states to logits."""

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from trackstar.errors import ModelError
from trackstar.model.adapter import unwrapped

# Fields of a configuration for the bound on logits (Gemma 2; RecurrentGemma; xLSTM).
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """Map from the last hidden states h to logits.

    z = cap·tanh(scale·(h Wᵀ + b)/cap), or z = scale·(h Wᵀ + b) without a cap.

    Attributes:
        weight: W, one row per token of the vocabulary.
        bias: b, or None.
        scale: Factor on the logits: Cohere's multiplier, the inverse of Granite's divisor, else 1.
        cap: Gemma 2's soft cap, or None.
    """

    weight: Float[Tensor, "vocabulary width"]
    bias: Float[Tensor, "vocabulary"] | None
    scale: float
    cap: float | None

    def logits(self, hidden: Float[Tensor, "positions width"]) -> Float[Tensor, "positions vocabulary"]:
        """Logits of each position, in the dtype of the hidden states."""
        logits = nn.functional.linear(hidden, self.weight, self.bias)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


def embedding_weight(module: PreTrainedModel) -> Float[Tensor, "vocabulary width"]:
    """The weight of the input embeddings, also if an adapter trains some of its rows."""
    return module.get_input_embeddings().weight  # pyright: ignore[reportReturnType]


def possible_heads(module: PreTrainedModel, source: str) -> list[Head]:
    """What the head may be: with the configuration's factor, or without it where that precedes the head.

    Raises:
        ModelError: It is no linear layer.
    """
    output = unwrapped(module.get_output_embeddings())
    if not isinstance(output, nn.Linear):
        found = f"an adapter's {type(output).__name__}" if hasattr(output, "base_layer") else type(output).__name__
        raise ModelError(f"{source}: found {found} as output head; expected one linear layer")
    config = module.config.get_text_config()
    multiplier = getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)
    cap = next((cap for name in _CAPS if (cap := getattr(config, name, None))), None)
    scales = dict.fromkeys(((multiplier or 1.0) / (divisor or 1.0), 1.0))
    return [Head(weight=output.weight, bias=output.bias, scale=scale, cap=cap) for scale in scales]
