"""What a pretraining run is made with: the model's shape, the optimizer, the order of the data."""

import dataclasses
import math
from typing import Literal

from trackstar.errors import OptionError

BYTES_AND_SPECIALS = 258
"""Smallest vocabulary of a tokenizer trained here: 256 bytes, one token before and one after each text."""

# What may change when a run goes on: neither touches a step that has been made.
FREE_TO_CHANGE = frozenset({"steps", "checkpoint_steps"})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PretrainingConfig:
    """The settings of a pretraining run; the model is a Llama of Transformers in float32.

    The optimizer's defaults are those of the paper's pretraining (Table A.4): Adafactor at a relative step of
    1/√max(step, 10,000), that is 0.01 for 10,000 steps and less and less after.

    Attributes:
        width: Size of the hidden states.
        layers: Transformer layers.
        heads: Attention heads; `width / heads` is a head's size, which must be even.
        key_value_heads: Heads of keys and values, shared by groups of attention heads; None is one each.
        mlp_width: Size of the hidden layer of each MLP.
        context_tokens: Most tokens that the model reads at once; longer examples are split into windows of this size.
        vocabulary: Tokens of the tokenizer that is trained on the corpus, at most; a tokenizer that is given brings
            its own.
        tied_embeddings: Whether the output head is the token embedding.
        initial_spread: Standard deviation of the initial weights; Adafactor's steps are relative to it.
        optimizer: `adafactor` (Transformers') or `adamw` (torch's).
        base_learning_rate: See `learning_rate`; relative to each weight matrix's size for Adafactor, absolute for
            AdamW.
        warmup_steps: See `learning_rate`.
        steps: Optimizer steps.
        batch_tokens: Most tokens of a batch, padding included; a batch holds whole examples.
        pool_examples: Batches are made of examples of similar length within random pools of this many.
        seed: Of the initial weights and of the order of the data.
        checkpoint_steps: Steps between checkpoints; the last step always has one.

    Raises:
        OptionError: A value cannot be used; the message names it.
    """

    width: int = 256
    layers: int = 6
    heads: int = 4
    key_value_heads: int | None = None
    mlp_width: int = 1024
    context_tokens: int = 512
    vocabulary: int = 8192
    tied_embeddings: bool = True
    initial_spread: float = 0.02
    optimizer: Literal["adafactor", "adamw"] = "adafactor"
    base_learning_rate: float = 1.0
    warmup_steps: int = 10_000
    steps: int = 10_000
    batch_tokens: int = 4096
    pool_examples: int = 2048
    seed: int = 0
    checkpoint_steps: int = 1000

    def __post_init__(self) -> None:
        for field in ("width", "layers", "heads", "mlp_width", "warmup_steps", "steps", "pool_examples"):
            _check_at_least(field, getattr(self, field), 1)
        _check_at_least("checkpoint_steps", self.checkpoint_steps, 1)
        _check_at_least("context_tokens", self.context_tokens, 4)
        _check_at_least("batch_tokens", self.batch_tokens, 2)
        _check_at_least("vocabulary", self.vocabulary, BYTES_AND_SPECIALS)
        _check_at_least("seed", self.seed, 0)
        for field in ("initial_spread", "base_learning_rate"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value > 0):
                raise OptionError(f"{field} is {value}; expected a finite number above 0")
        if self.optimizer not in ("adafactor", "adamw"):
            raise OptionError(f"optimizer is {self.optimizer!r}; expected adafactor or adamw")
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise OptionError(
                f"width is {self.width} for {self.heads} heads; expected an even number of dimensions for each head"
            )
        shared = self.key_value_heads
        if shared is not None and (shared < 1 or self.heads % shared):
            raise OptionError(f"key_value_heads is {shared}; expected a divisor of the {self.heads} heads")


def _check_at_least(field: str, value: int, least: int) -> None:
    if value < least:
        raise OptionError(f"{field} is {value}; expected at least {least}")
