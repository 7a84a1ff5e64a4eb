"""How a model generates answers, as settings that are checked when they are made."""

import dataclasses
import math
from typing import Any

from trackstar.choices import STOPS, Stop
from trackstar.errors import OptionError, check_at_least, check_choice


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSettings:
    """How answers are generated.

    Attributes:
        max_new_tokens: Most tokens of an answer.
        temperature: Divisor of the logits before a token is sampled; 0 takes the most probable one.
        top_p: Share of the probability, taken from the most probable tokens on, that is sampled
            from.
        sampling_seed: Seed of the samples.
        stop: `line` ends the answer before a line break that follows text; `end` only at the
            model's end-of-text tokens.
        chat: Whether a prompt is a user's message in the tokenizer's chat template.

    Raises:
        OptionError: A setting is out of range.
    """

    max_new_tokens: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    sampling_seed: int = 0
    stop: Stop = "line"
    chat: bool = False

    def __post_init__(self) -> None:
        check_at_least("max_new_tokens", self.max_new_tokens)
        check_at_least("sampling_seed", self.sampling_seed, 0)
        check_choice("stop", self.stop, STOPS)
        if not 0 <= self.temperature < math.inf:
            raise OptionError(
                f"`temperature`: expected 0 (the most probable token) or a positive number, found {self.temperature}"
            )
        if not 0 < self.top_p <= 1:
            raise OptionError(f"`top_p`: expected more than 0 and at most 1, found {self.top_p}")

    @classmethod
    def default(cls, name: str) -> Any:
        """The default of a setting."""
        return next(field.default for field in dataclasses.fields(cls) if field.name == name)
