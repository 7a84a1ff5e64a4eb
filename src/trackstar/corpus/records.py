"""What goes into the index and what is asked of it, as data: training examples, queries, and both tokenized."""

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Int32


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One record of a corpus: a training example as data.

    Attributes:
        example_id: Its name in results.
        text: What the model was trained on.
        record: Its place in the corpus, counted from 0 over all records.
    """

    example_id: str
    text: str
    record: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """z_q: a prompt and the completion whose probability is to be explained.

    Attributes:
        query_id: Its name in results.
        prompt: What the model reads.
        completion: What the model says; only its tokens enter the query's loss.
        record: The query's whole line as read (the release's `relation`, `entity0` ...), kept for results; empty for a
            query that did not come from a file.
    """

    query_id: str
    prompt: str
    completion: str
    record: Mapping[str, object] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedExample:
    """Tokens with the target positions whose cross-entropies are summed: what a gradient is computed from.

    Attributes:
        example_id: The example's name; window k > 0 of a long document is named `ID#k`.
        parent_id: The name of the document that it is a window of (itself where there is one window).
        record: The document's place in the corpus (0 for a query).
        window: The window's place in the document, from 0.
        text: The window's own text.
        token_ids: What the model reads.
        target_mask: Where true, the token is predicted from those before it and its cross-entropy counts.
            The first position has nothing before it and is always false.
    """

    example_id: str
    parent_id: str
    record: int
    window: int
    text: str
    token_ids: Int32[np.ndarray, "tokens"]
    target_mask: Bool[np.ndarray, "tokens"]
