"""Tokenize examples as the tokenizer prescribes for training, and split long ones into windows."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from trackstar.corpus.fields import encodable
from trackstar.corpus.records import Example, TokenizedExample, TokenSequence
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
    examples: Iterable[Example],
    tokenizer: Tokenizer,
    *,
    window_tokens: int,
    overlap: int = 1,
    truncate: bool = False,
) -> Iterator[list[TokenizedExample]]:
    """Tokenize examples, a few hundred at a time, into one list of windows per example, in order.

    A text that fits one window is tokenized as the tokenizer does by default, with its special
    tokens before and after the text, unless the example has them in its text. A longer text is
    split into windows. Each window begins with the leading special tokens, and only the last ends
    with the trailing ones. Each but the first repeats the last `overlap` tokens of the one before,
    which are context there and not targets. So every token that has a predecessor, and is one of the
    example's targets, is a target exactly once. A window without a target is left out.

    Args:
        examples: Examples to tokenize; read a few hundred ahead.
        tokenizer: The model's tokenizer.
        window_tokens: Most tokens per window, special tokens included.
        overlap: Number of tokens that a window repeats from the one before; at least 1.
        truncate: Whether a longer text is cut instead, as training with truncation does: the first
            tokens of the text, between the tokenizer's special tokens.

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
    return _tokenized(iter(examples), backend, window_tokens, overlap, truncate)


def tokenize_example(
    example: Example, tokenizer: Tokenizer, *, window_tokens: int, overlap: int = 1, truncate: bool = False
) -> list[TokenizedExample]:
    """The windows of one example; `tokenize_examples` is faster for many."""
    return next(
        tokenize_examples([example], tokenizer, window_tokens=window_tokens, overlap=overlap, truncate=truncate)
    )


def token_sequences(examples: Iterable[Example], tokenizer: Tokenizer) -> Iterator[tuple[Example, TokenSequence]]:
    """The tokens of whole examples, without windows; empty for an example without a text.

    Raises:
        CorpusError: A text cannot be tokenized; the message names the example.
        ModelError: The tokenizer is not a fast one, or fails.
    """
    backend = fast_backend(tokenizer)
    special = backend.num_special_tokens_to_add(False)
    for batch in _batches(iter(examples)):
        for example, stream in zip(batch, _streams(backend, batch), strict=True):
            if len(stream.ids) == (special if example.special_tokens and example.tokens is None else 0):
                stream = _Stream(ids=[], mask=None, before=0, after=0)
            mask = np.ones(len(stream.ids), dtype=bool) if stream.mask is None else stream.mask
            yield example, TokenSequence(token_ids=np.array(stream.ids, dtype=np.int32), target_mask=mask)


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
        offsets: Each token's characters in the text, half-open; (0, 0) for a special token that the
            text does not spell out.
        before: Number of special tokens before the text.
        after: Number of special tokens after the text.
    """

    token_ids: list[int]
    offsets: list[tuple[int, int]]
    before: int
    after: int


def encode(backend: "Backend", text: str, description: str, *, special_tokens: bool = True) -> EncodedText:
    """The text's tokens; messages begin with the description.

    Without `special_tokens`, none are put around the text: it holds those that it is to have.

    A text that itself begins with the token that the tokenizer puts before it, such as `<s>`, gets
    it once, as in training; so does one that ends with the token that is put after it.

    Raises:
        CorpusError: The text holds half a surrogate pair.
        ModelError: The tokenizer fails.
    """
    try:
        encoding = backend.encode(encodable(text, f"{description}: the text"), add_special_tokens=special_tokens)
    except CorpusError:
        raise
    except Exception as error:  # the tokenizers library raises bare exceptions
        reason = one_line(error)
        raise ModelError(
            f"{description}: the tokenizer cannot read it ({reason}); expected one that reads any text"
        ) from error
    return _encoded_text(backend, encoding, special_tokens=special_tokens)


def _encoded_text(backend: "Backend", encoding: "Encoding", *, special_tokens: bool) -> EncodedText:
    before, after = _count_special_tokens(encoding) if special_tokens else (0, 0)
    token_ids = encoding.ids
    repeated = _repeated(backend, token_ids, before, after)
    offsets = encoding.offsets
    if before in repeated:  # the token that stays is the one that the text spells out
        offsets[before - 1] = offsets[before]
    return EncodedText(
        token_ids=[token for position, token in enumerate(token_ids) if position not in repeated],
        offsets=[span for position, span in enumerate(offsets) if position not in repeated],
        before=before,
        after=after - (len(token_ids) - after in repeated),
    )


def leading_token(tokenizer: Tokenizer) -> str:
    """The token that the tokenizer puts directly before every text, such as `<s>`; empty for none.

    Raises:
        ModelError: The tokenizer is not a fast one.
    """
    backend = fast_backend(tokenizer)
    encoding = backend.encode("a")
    before, _ = _count_special_tokens(encoding)
    added = backend.get_added_tokens_decoder().get(encoding.ids[before - 1]) if before else None
    return "" if added is None else added.content


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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Stream:
    """An example's tokens before they are split.

    Attributes:
        ids: The token ids, special tokens included.
        mask: Which are targets, as far as they have context; None for all.
        before: Number of special tokens before the text, if they are counted.
        after: Number of those after it.
        offsets: Range of characters of each token; None if they are not computed.
    """

    ids: list[int]
    mask: np.ndarray | None
    before: int
    after: int
    offsets: list[tuple[int, int]] | None = None


def _tokenized(
    examples: Iterator[Example], backend: "Backend", window_tokens: int, overlap: int, truncate: bool
) -> Iterator[list[TokenizedExample]]:
    special = backend.num_special_tokens_to_add(False)
    for batch in _batches(examples):
        for example, stream in zip(batch, _streams(backend, batch), strict=True):
            least = special if example.special_tokens and example.tokens is None else 0
            if len(stream.ids) == least or len(stream.ids) < 2:
                yield []
            elif len(stream.ids) > window_tokens:
                if stream.offsets is None and example.tokens is None:
                    stream = _stream_of(example, _encoded(backend, example))
                if truncate:
                    yield _with_targets([_truncated(example, stream, backend, window_tokens)])
                else:
                    yield _with_targets(_windows(example, stream, backend, window_tokens, overlap))
            else:
                yield _with_targets([_whole(example, stream, backend)])


def _with_targets(windows: list[TokenizedExample]) -> list[TokenizedExample]:
    """The windows that have a target."""
    return [window for window in windows if window.target_mask.any()]


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


def _streams(backend: "Backend", batch: list[Example]) -> Iterator[_Stream]:
    """Each example's tokens, in order; examples of one kind that follow each other are tokenized together."""
    for (tokens, special_tokens, marked), group in itertools.groupby(
        batch, lambda example: (example.tokens is not None, example.special_tokens, example.targets is not None)
    ):
        alike = list(group)
        if tokens:
            yield from map(_given, alike)
            continue
        texts = [example.text for example in alike]
        try:
            # The fast one computes no offsets; only texts with marked targets, or that are split, need them.
            encode_together = backend.encode_batch if marked else backend.encode_batch_fast
            encodings = encode_together(texts, add_special_tokens=special_tokens)
        except Exception:  # encode one by one, so that the error names the example
            yield from (_stream_of(example, _encoded(backend, example)) for example in alike)
            continue
        if marked:
            for example, encoding in zip(alike, encodings, strict=True):
                yield _stream_of(example, _encoded_text(backend, encoding, special_tokens=special_tokens))
        else:
            yield from _unmarked(backend, encodings, special_tokens)


def _unmarked(backend: "Backend", encodings: "list[Encoding]", special_tokens: bool) -> Iterator[_Stream]:
    """The tokens of texts of which every token is a target, without offsets."""
    before, after = _count_special_tokens(backend.encode("a")) if special_tokens else (0, 0)
    for encoding in encodings:
        ids = encoding.ids
        repeated = _repeated(backend, ids, before, after)
        if repeated:
            ids = [token for position, token in enumerate(ids) if position not in repeated]
        yield _Stream(ids=ids, mask=None, before=0, after=0)


def _given(example: Example) -> _Stream:
    """The token ids that an example states."""
    assert example.tokens is not None, example.example_id
    return _Stream(ids=example.tokens.token_ids.tolist(), mask=example.tokens.target_mask, before=0, after=0)


def _encoded(backend: "Backend", example: Example) -> EncodedText:
    return encode(backend, example.text, f"example {example.example_id}", special_tokens=example.special_tokens)


def _stream_of(example: Example, encoded: EncodedText) -> _Stream:
    """A text's tokens with offsets, and which of them have a character of a target."""
    before, after, ids, offsets = encoded.before, encoded.after, encoded.token_ids, encoded.offsets
    mask = None
    if example.targets is not None:
        mask = np.zeros(len(ids), dtype=bool)
        stop_of_text = len(ids) - after
        bounds = _whole_bounds(offsets[before:stop_of_text])
        for start, stop in example.targets:
            # A token without characters, such as one that the tokenizer prepends, is where it begins.
            ends = np.maximum(bounds[:, 1], bounds[:, 0] + 1)
            mask[before:stop_of_text] |= (bounds[:, 0] < stop) & (ends > start)
        ends_with_target = bool(example.targets) and example.targets[-1][1] >= len(example.text)
        mask[stop_of_text:] = ends_with_target
    return _Stream(ids=ids, mask=mask, before=before, after=after, offsets=offsets)


def _whole_bounds(offsets: list[tuple[int, int]]) -> np.ndarray:
    """Each token's first character and the one behind its last, with the white space that it begins with.

    A tokenizer that trims offsets leaves that space out; a token of nothing but spaces then seems to
    lie behind them. Characters that no token has are the next token's.
    """
    bounds = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    ends = np.maximum.accumulate(np.concatenate([[0], bounds[:-1, 1]]))
    bounds[:, 0] = np.minimum(bounds[:, 0], ends[: len(bounds)])
    return bounds


def _whole(example: Example, stream: _Stream, backend: "Backend") -> TokenizedExample:
    target_mask = np.ones(len(stream.ids), dtype=bool) if stream.mask is None else stream.mask.copy()
    target_mask[0] = False
    return TokenizedExample(
        example_id=example.example_id,
        parent_id=example.example_id,
        record=example.record,
        window=0,
        text=example.text if example.tokens is None else _decoded(backend, stream.ids),
        token_ids=np.array(stream.ids, dtype=np.int32),
        target_mask=target_mask,
        metadata=example.metadata,
    )


def _decoded(backend: "Backend", ids: list[int]) -> str:
    """The text of token ids, special tokens included."""
    return backend.decode(ids, skip_special_tokens=False)


def _truncated(example: Example, stream: _Stream, backend: "Backend", window_tokens: int) -> TokenizedExample:
    """The beginning of a text that is longer than one window, with the special tokens around it."""
    stop = window_tokens - stream.after
    end = len(stream.ids) - stream.after
    kept = [*range(stop), *range(end, len(stream.ids))]
    mask = None if stream.mask is None else stream.mask[kept]
    cut = _Stream(ids=[stream.ids[place] for place in kept], mask=mask, before=stream.before, after=stream.after)
    whole = _whole(example, cut, backend)
    if stream.offsets is None:
        return whole
    return dataclasses.replace(whole, text=example.text[: stream.offsets[stop - 1][1]])


def _windows(
    example: Example, stream: _Stream, backend: "Backend", window_tokens: int, overlap: int
) -> list[TokenizedExample]:
    """The windows of a text that is longer than one window."""
    before = stream.before
    token_ids = np.array(stream.ids, dtype=np.int32)
    prefix, rest = token_ids[:before], token_ids[before:]  # the rest ends with the trailing special tokens
    offsets = None if stream.offsets is None else stream.offsets[before : len(token_ids) - stream.after]
    capacity = window_tokens - before  # tokens of the rest per window
    step = capacity - overlap  # new tokens per window after the first
    count = 1 + math.ceil((len(rest) - capacity) / step)
    windows = []
    for window in range(count):
        start, stop = window * step, min(window * step + capacity, len(rest))
        target_mask = np.ones(before + stop - start, dtype=bool)
        if stream.mask is not None:
            target_mask[before:] = stream.mask[before:][start:stop]
        target_mask[: before + overlap if window else 1] = False
        if offsets is None:
            text = _decoded(backend, rest[start:stop].tolist())
        else:
            text = example.text[_text_span(offsets, start, stop, len(example.text))]
        windows.append(
            TokenizedExample(
                example_id=f"{example.example_id}#{window}" if window else example.example_id,
                parent_id=example.example_id,
                record=example.record,
                window=window,
                text=text,
                token_ids=np.concatenate([prefix, rest[start:stop]]),
                target_mask=target_mask,
                metadata=example.metadata,
            )
        )
    return windows


def _text_span(offsets: list[tuple[int, int]], start: int, stop: int, characters: int) -> slice:
    """Characters of the tokens from `start` to `stop`; the first and last windows reach the text's ends."""
    first = 0 if start == 0 else offsets[start][0] if start < len(offsets) else characters
    return slice(first, offsets[stop - 1][1] if stop < len(offsets) else characters)
