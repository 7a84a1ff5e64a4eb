"""Settings of a pretraining run: the model's shape, the optimizer, the data order."""

import dataclasses
import math

from trackstar.choices import OPTIMIZERS, OptimizerName
from trackstar.errors import OptionError, check_at_least, check_choice
from trackstar.text import abridged

BYTES_AND_SPECIALS = 258
"""Smallest vocabulary of a trained tokenizer: 256 bytes, and a token before and after each text."""

FREE_TO_CHANGE = frozenset({"steps", "checkpoint_steps"})
"""Settings that may change when a run is resumed, since no finished step depends on them."""

_LARGEST = {
    "width": 2**16,
    "layers": 1000,
    "heads": 2**12,
    "mlp_width": 2**20,
    "context_tokens": 2**20,
    "vocabulary": 2**24,
    "batch_tokens": 2**32,
}
"""Sizes beyond any model that this trainer can train."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PretrainingConfig:
    """Settings of a pretraining run; the model is a Transformers Llama in float32.

    The optimizer's defaults are those of the paper's pretraining (Table A.4): Adafactor at a relative step of
    1/√max(step, 10,000), which is 0.01 for 10,000 steps and decreases after them.

    Attributes:
        width: Size of the hidden states.
        layers: Number of Transformer layers.
        heads: Number of attention heads; a head's size, `width / heads`, must be even.
        key_value_heads: Number of heads of keys and values, shared by groups of attention heads;
            None is one for each.
        mlp_width: Size of the hidden layer of each MLP.
        context_tokens: Most tokens that the model reads at once; longer examples are split into
            windows of this size.
        vocabulary: Largest vocabulary of the tokenizer that is trained on the corpus; not used with
            an existing tokenizer.
        tied_embeddings: Whether the output head is the token embedding.
        initial_spread: Standard deviation of the initial weights; Adafactor's steps are relative to it.
        optimizer: `adafactor` (Transformers) or `adamw` (torch).
        base_learning_rate: See `learning_rate`; relative to each weight matrix's size for
            Adafactor, absolute for AdamW.
        warmup_steps: See `learning_rate`.
        steps: Number of optimizer steps.
        batch_tokens: Most tokens per batch, padding included; a batch holds whole examples.
        pool_examples: Number of examples of a random pool, within which batches are made of similar lengths.
        seed: Seed of the initial weights and of the data order.
        checkpoint_steps: Steps between checkpoints; the last step always has one.

    Raises:
        OptionError: A value cannot be used; the message names the setting.
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
    optimizer: OptimizerName = "adafactor"
    base_learning_rate: float = 1.0
    warmup_steps: int = 10_000
    steps: int = 10_000
    batch_tokens: int = 4096
    pool_examples: int = 2048
    seed: int = 0
    checkpoint_steps: int = 1000

    def __post_init__(self) -> None:
        for field, largest in _LARGEST.items():
            if isinstance(value := getattr(self, field), int) and value > largest:
                raise OptionError(f"`{field}`: expected at most {largest:,}, found {abridged(value)}")
        for field in ("width", "layers", "heads", "mlp_width", "warmup_steps", "steps", "pool_examples"):
            check_at_least(field, getattr(self, field))
        check_at_least("checkpoint_steps", self.checkpoint_steps)
        check_at_least("context_tokens", self.context_tokens, 4)
        check_at_least("batch_tokens", self.batch_tokens, 2)
        check_at_least("vocabulary", self.vocabulary, BYTES_AND_SPECIALS)
        check_at_least("seed", self.seed, 0)
        for field in ("initial_spread", "base_learning_rate"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value > 0):
                raise OptionError(f"`{field}`: expected a finite number above 0, found {value}")
        if self.initial_spread > 1:
            raise OptionError(f"`initial_spread`: expected at most 1, found {self.initial_spread}")
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise OptionError(
                f"`width`: expected an even number of dimensions for each of {self.heads} heads, found {self.width}; "
                "choose another `width` or another number of `heads`"
            )
        shared = self.key_value_heads
        if shared is not None and (shared < 1 or self.heads % shared):
            raise OptionError(f"`key_value_heads`: expected a divisor of the {self.heads} `heads`, found {shared}")
