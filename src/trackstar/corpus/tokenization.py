"""Tokenize examples as the tokenizer prescribes for training, and split long ones into windows."""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from trackstar.corpus.fields import encodable
from trackstar.corpus.records import Example, TokenizedExample
from trackstar.errors import CorpusError, ModelError, OptionError, check_at_least
from trackstar.text import one_line

if TYPE_CHECKING:
    from tokenizers import Encoding
    from tokenizers import Tokenizer as Backend

EXAMPLES_AT_ONCE = 256
CHARACTERS_AT_ONCE = 2**20


@runtime_checkable
class Tokenizer(Protocol):
    """A tokenizer of the Transformers library. It must be a fast one, which gives character offsets."""

    @property
    def is_fast(self) -> bool:
        """Whether it is backed by the `tokenizers` library."""
        ...


def tokenize_examples(
    examples: Iterable[Example], tokenizer: Tokenizer, *, window_tokens: int, overlap: int = 1
) -> Iterator[list[TokenizedExample]]:
    """Tokenize examples, a few hundred at a time, into one list of windows per example, in order.

    A text that fits one window is tokenized as the tokenizer does by default, with its special
    tokens before and after the text. A longer text is split into windows. Each window begins with
    the leading special tokens, and only the last ends with the trailing ones. Each but the first
    repeats the last `overlap` tokens of the one before, which are context there and not targets. So
    every token that has a predecessor is a target exactly once.

    Args:
        examples: Examples to tokenize; read a few hundred ahead.
        tokenizer: The model's tokenizer.
        window_tokens: Most tokens per window, special tokens included.
        overlap: Number of tokens that a window repeats from the one before; at least 1.

    Returns:
        An iterator over one list per example: its windows; empty if it has no token that can be a
        target.

    Raises:
        CorpusError: A text cannot be tokenized; the message names the example.
        ModelError: The tokenizer is not a fast one, or fails.
        OptionError: `overlap` is below 1, or `window_tokens` leaves no room for a target.
    """
    backend = fast_backend(tokenizer)
    check_window(backend, window_tokens=window_tokens, overlap=overlap)
    return _tokenized(iter(examples), backend, window_tokens, overlap)


def tokenize_example(
    example: Example, tokenizer: Tokenizer, *, window_tokens: int, overlap: int = 1
) -> list[TokenizedExample]:
    """The windows of one example; `tokenize_examples` is faster for many."""
    return next(tokenize_examples([example], tokenizer, window_tokens=window_tokens, overlap=overlap))


def fast_backend(tokenizer: Tokenizer) -> "Backend":
    """The `tokenizers` object behind a fast tokenizer, set to neither truncate nor pad.

    Raises:
        ModelError: The tokenizer is not a fast one.
    """
    backend: Backend | None = getattr(tokenizer, "backend_tokenizer", None)
    if not tokenizer.is_fast or backend is None:
        raise ModelError(
            f"the tokenizer is a {type(tokenizer).__name__}, which gives no character offsets; "
            "expected a fast tokenizer; save it with its tokenizer.json"
        )
    backend.no_truncation()
    backend.no_padding()
    # The tokenizer's setting for special tokens spelled out in a text (the stubs have no setter).
    backend.encode_special_tokens = bool(getattr(tokenizer, "split_special_tokens", False))  # pyright: ignore[reportAttributeAccessIssue]
    return backend


def check_window(backend: "Backend", *, window_tokens: int, overlap: int) -> None:
    """Raise if a window has no room for special tokens, overlap and a target.

    Raises:
        OptionError: `overlap` is below 1, so that a window's first target would have no context, or
            `window_tokens` is too small.
    """
    special = backend.num_special_tokens_to_add(False)
    check_at_least("overlap", overlap)
    least = special + overlap + 1
    if window_tokens < least:
        raise OptionError(
            f"`window_tokens`: expected {least} or more ({special} special tokens, {overlap} of overlap and one "
            f"target), found {window_tokens}"
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EncodedText:
    """A text's tokens, with the special tokens that the tokenizer puts around it.

    Attributes:
        token_ids: All tokens.
        offsets: Each token's characters in the text, half-open; (0, 0) for a special token.
        before: Number of special tokens before the text.
        after: Number of special tokens after the text.
    """

    token_ids: list[int]
    offsets: list[tuple[int, int]]
    before: int
    after: int


def encode(backend: "Backend", text: str, description: str) -> EncodedText:
    """The text's tokens; messages begin with the description.

    A text that itself begins with the token that the tokenizer puts before it, such as `<s>`, gets
    it once, as in training; so does one that ends with the token that is put after it.

    Raises:
        CorpusError: The text holds half a surrogate pair.
        ModelError: The tokenizer fails.
    """
    try:
        encoding = backend.encode(encodable(text, f"{description}: the text"))
    except CorpusError:
        raise
    except Exception as error:  # the tokenizers library raises bare exceptions
        reason = one_line(error)
        raise ModelError(
            f"{description}: the tokenizer cannot read it ({reason}); expected one that reads any text"
        ) from error
    before, after = _count_special_tokens(encoding)
    token_ids = encoding.ids
    repeated = _repeated(backend, token_ids, before, after)
    return EncodedText(
        token_ids=[token for position, token in enumerate(token_ids) if position not in repeated],
        offsets=[span for position, span in enumerate(encoding.offsets) if position not in repeated],
        before=before,
        after=after - (len(token_ids) - after in repeated),
    )


def count_spelled_out(texts: Iterable[str], tokenizer: Tokenizer) -> tuple[int, str]:
    """Number of texts that begin with the token that the tokenizer puts before every text.

    Returns:
        The number, and the token as it is spelled, such as `<s>`, for messages.

    Raises:
        ModelError: The tokenizer is not a fast one.
    """
    backend = fast_backend(tokenizer)
    encoding = backend.encode("a")
    before, _ = _count_special_tokens(encoding)
    added = backend.get_added_tokens_decoder().get(encoding.ids[before - 1]) if before else None
    return (0, "") if added is None else (sum(text.startswith(added.content) for text in texts), added.content)


def _count_special_tokens(encoding: "Encoding") -> tuple[int, int]:
    """Number of special tokens before the text and after it."""
    mask = encoding.special_tokens_mask
    before = next((position for position, special in enumerate(mask) if not special), len(mask))
    after = next((position for position, special in enumerate(reversed(mask)) if not special), 0)
    return before, after


def _repeated(backend: "Backend", token_ids: list[int], before: int, after: int) -> set[int]:
    """Positions to leave out, so that a token that the text spells out and the tokenizer adds is there once.

    Before the text the added token stays, so that windows begin with it. After it the text's own
    stays, so that a query keeps it.
    """
    first, last = before, len(token_ids) - after - 1
    repeated = set[int]()
    if before and first <= last and token_ids[first] == token_ids[first - 1]:
        repeated.add(first)
    if after and first <= last and token_ids[last] == token_ids[last + 1]:
        repeated.add(last + 1)
    added = backend.get_added_tokens_decoder() if repeated else {}
    return {position for position in repeated if token_ids[position] in added}


def _tokenized(
    examples: Iterator[Example], backend: "Backend", window_tokens: int, overlap: int
) -> Iterator[list[TokenizedExample]]:
    special = backend.num_special_tokens_to_add(False)
    for batch in _batches(examples):
        for example, token_ids in zip(batch, _token_ids(backend, batch), strict=True):
            if len(token_ids) > window_tokens:
                encoded = encode(backend, example.text, f"example {example.example_id}")
                yield _windows(example, encoded, window_tokens, overlap)
            elif len(token_ids) == special or len(token_ids) < 2:
                yield []
            else:
                yield [_whole(example, token_ids)]


def _batches(examples: Iterator[Example]) -> Iterator[list[Example]]:
    """Examples in groups that are large enough for the tokenizer's threads and bounded in memory."""
    batch: list[Example] = []
    characters = 0
    for example in examples:
        batch.append(example)
        characters += len(example.text)
        if len(batch) == EXAMPLES_AT_ONCE or characters >= CHARACTERS_AT_ONCE:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _token_ids(backend: "Backend", batch: list[Example]) -> list[list[int]]:
    """Each text's token ids, special tokens included."""
    try:
        # Faster than `encode_batch`, as it computes no offsets; only texts that are split need them.
        encodings = backend.encode_batch_fast([example.text for example in batch])
    except Exception:  # encode one by one, so that the error names the example
        return [encode(backend, example.text, f"example {example.example_id}").token_ids for example in batch]
    before, after = _count_special_tokens(backend.encode("a"))
    whole = []
    for encoding in encodings:
        token_ids = encoding.ids
        repeated = _repeated(backend, token_ids, before, after)
        whole.append(
            [token for place, token in enumerate(token_ids) if place not in repeated] if repeated else token_ids
        )
    return whole


def _whole(example: Example, token_ids: list[int]) -> TokenizedExample:
    target_mask = np.ones(len(token_ids), dtype=bool)
    target_mask[0] = False
    return TokenizedExample(
        example_id=example.example_id,
        parent_id=example.example_id,
        record=example.record,
        window=0,
        text=example.text,
        token_ids=np.array(token_ids, dtype=np.int32),
        target_mask=target_mask,
    )


def _windows(example: Example, encoded: EncodedText, window_tokens: int, overlap: int) -> list[TokenizedExample]:
    """The windows of a text that is longer than one window."""
    before, after = encoded.before, encoded.after
    token_ids = np.array(encoded.token_ids, dtype=np.int32)
    prefix, stream = token_ids[:before], token_ids[before:]  # the stream ends with the trailing special tokens
    offsets = encoded.offsets[before : len(token_ids) - after]
    capacity = window_tokens - before  # tokens of the stream per window
    step = capacity - overlap  # new tokens per window after the first
    count = 1 + math.ceil((len(stream) - capacity) / step)
    windows = []
    for window in range(count):
        start, stop = window * step, min(window * step + capacity, len(stream))
        target_mask = np.ones(before + stop - start, dtype=bool)
        target_mask[: before + overlap if window else 1] = False
        windows.append(
            TokenizedExample(
                example_id=f"{example.example_id}#{window}" if window else example.example_id,
                parent_id=example.example_id,
                record=example.record,
                window=window,
                text=example.text[_text_span(offsets, start, stop, len(example.text))],
                token_ids=np.concatenate([prefix, stream[start:stop]]),
                target_mask=target_mask,
            )
        )
    return windows


def _text_span(offsets: list[tuple[int, int]], start: int, stop: int, characters: int) -> slice:
    """Characters of the tokens from `start` to `stop`; the first and last windows reach the text's ends."""
    first = 0 if start == 0 else offsets[start][0] if start < len(offsets) else characters
    return slice(first, offsets[stop - 1][1] if stop < len(offsets) else characters)
