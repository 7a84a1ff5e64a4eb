"""Training examples, queries z_q, and both tokenized, as data."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32

from trackstar.choices import Join, Kind


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One record of a corpus: a training example as data.

    Attributes:
        example_id: Its name in results.
        text: Text that the model was trained on; for an example of token ids, it may be empty.
        record: Number of its record in the corpus, from 0.
        targets: Half-open ranges of characters of the text, ascending and apart. A token that has a
            character in one of them is a target; so are special tokens behind the text if the last
            range reaches its end. None makes every token a target.
        special_tokens: Whether the tokenizer adds its special tokens around the text. A rendered
            chat has them in its text.
        tokens: The example as token ids, in place of the text; None for a text.
        metadata: The record's other fields as a JSON object, or nothing.
    """

    example_id: str
    text: str
    record: int
    targets: tuple[tuple[int, int], ...] | None = None
    special_tokens: bool = True
    tokens: "TokenSequence | None" = None
    metadata: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenSequence:
    """Token ids as the model was trained on them.

    Attributes:
        token_ids: The model's input.
        target_mask: True if the position's token is a target; the first position never is one.
    """

    token_ids: Int32[np.ndarray, "tokens"]
    target_mask: Bool[np.ndarray, "tokens"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """z_q: a prompt and the completion whose probability is to be explained.

    A query of texts is tokenized as `query_text` joins them. A query of tokens, such as the model's
    own answer, is asked token for token; its prompt and completion are then the texts of its
    tokens, for people, and are joined as they are. A query of messages is a conversation in the
    tokenizer's chat template, of which the last answer is the completion; `query_with_texts` makes
    it a query of tokens.

    Attributes:
        query_id: Its name in results.
        prompt: Context, whose tokens do not enter the loss.
        completion: Text whose tokens are the targets of the query's loss.
        record: The query's whole line as read, with fields such as the release's `relation` and
            `entity0`, for results; empty for a query that was not read from a file.
        join: How prompt and completion are joined; see `joined`. A query of tokens ignores it.
        token_ids: The tokens to ask, special tokens included; None for a query of texts.
        target_mask: One flag per token, true for the targets of the loss; None for a query of texts.
        messages: The conversation, each message with `role` and `content`; None for any other query.
        tools: Descriptions of tools, which the chat template reads.
        chat_template: Text of the chat template; None is the tokenizer's own.
        kind: What its task asks for; None if that is unknown, which is treated as a fact.
        alternatives: The other completions of a choice; empty for any other kind.
        truth: The right answer, if the completion is another one, such as the model's own; empty if
            it is unknown; None if the completion is the right answer.
    """

    query_id: str
    prompt: str = ""
    completion: str = ""
    record: Mapping[str, object] = dataclasses.field(default_factory=dict)
    join: Join = "auto"
    token_ids: tuple[int, ...] | None = None
    target_mask: tuple[bool, ...] | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    tools: Sequence[Any] | None = None
    chat_template: str | None = None
    kind: Kind | None = None
    alternatives: tuple[str, ...] = ()
    truth: str | None = None

    @property
    def asks_for_fact(self) -> bool:
        """Whether its gradient belongs to R_eval: it asks for a fact, or its kind is unknown."""
        return self.kind in (None, "fact")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedExample:
    """Tokens of an example, of one window of a long example, or of a query, with a mask of target positions.

    Attributes:
        example_id: Name; window k > 0 of a long example is named `ID#k`.
        parent_id: Name of the example that it is a window of; equal to `example_id` if it is the first.
        record: Number of the example's record in the corpus; 0 for a query.
        window: Number of the window in the example, from 0.
        text: Text of the window.
        token_ids: The model's input.
        target_mask: True if the position's token is predicted and its cross-entropy enters the loss.
            The first position has no context and is always false.
        metadata: The record's other fields (source, date, licence ...) as a JSON object, or
            nothing.
    """

    example_id: str
    parent_id: str
    record: int
    window: int
    text: str
    token_ids: Int32[np.ndarray, "tokens"]
    target_mask: Bool[np.ndarray, "tokens"]
    metadata: str = ""
