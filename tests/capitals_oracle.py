"""What the oracle needs of the capitals' corpus and questions: tokens by hand, and V by brute force."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

import reference
from capitals import TEXTS
from comparisons import reference_gradients
from tiny_models import tiny_tokenizer
from trackstar.corpus import Query, TokenizedExample
from trackstar.model.language_model import LanguageModel


def tokenized(text: str, *, completion_from: int | None = None) -> TokenizedExample:
    """The text's tokens after <s>; targets are all, or those with a character at or after `completion_from`."""
    encoding = tiny_tokenizer("bos")(text, return_offsets_mapping=True)
    targets = [
        place > 0 and (completion_from is None or end > completion_from)
        for place, (_, end) in enumerate(encoding["offset_mapping"])
    ]
    return TokenizedExample(
        example_id="",
        parent_id="",
        record=0,
        window=0,
        text=text,
        token_ids=np.array(encoding["input_ids"], dtype=np.int32),
        target_mask=np.array(targets),
    )


def tokenized_corpus() -> list[TokenizedExample]:
    return [tokenized(text) for text in TEXTS]


def tokenized_queries(queries: Sequence[Query]) -> list[TokenizedExample]:
    return [tokenized(f"{q.prompt} {q.completion}", completion_from=len(q.prompt)) for q in queries]


def second_moments(model: LanguageModel, examples: Sequence[TokenizedExample], kind: str) -> dict[str, Tensor] | None:
    if kind == "none":
        return None
    gradients = reference_gradients(model, examples)
    means = {m.name: reference.mean_squared_gradient([of[m.name] for of in gradients]) for m in model.matrices}
    if kind == "elementwise":
        return means
    return {name: reference.factored_second_moment(V) for name, V in means.items()}
