"""Texts to tokens as the tokenizer prescribes for training, long documents split into windows."""

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from trackstar.corpus.data_files import one_line
from trackstar.corpus.fields import encodable
from trackstar.corpus.records import Example, TokenizedExample
from trackstar.errors import CorpusError, ModelError, OptionError

if TYPE_CHECKING:
    from tokenizers import Encoding
    from tokenizers import Tokenizer as Backend

EXAMPLES_AT_ONCE = 256
CHARACTERS_AT_ONCE = 2**20


@runtime_checkable
class Tokenizer(Protocol):
    """A tokenizer of the transformers library; only fast ones, which know each token's place in the text, will do."""

    @property
    def is_fast(self) -> bool:
        """Whether the `tokenizers` library does the work."""
        ...


def tokenize_examples(
    examples: Iterable[Example], tokenizer: Tokenizer, *, window_tokens: int, overlap: int = 1
) -> Iterator[list[TokenizedExample]]:
    """Tokenize examples, a few hundred at a time; one list of windows an example, in order.

    A text that fits is tokenized as the tokenizer does by itself, with the special tokens that it puts before and
    after training text. A longer one is split into windows: each begins with the tokens that come before, only the
    last ends with those that come after, and each but the first repeats `overlap` tokens of the one before, which are
    context there and no targets. So every token that has a predecessor is a target exactly once.

    Args:
        examples: What to tokenize; read a few hundred ahead.
        tokenizer: The model's.
        window_tokens: Most tokens of a window, special tokens included.
        overlap: Tokens of the window before that a window repeats; at least 1.

    Returns:
        An iterator over one list an example: its windows, or nothing where no token of it can be a target.

    Raises:
        CorpusError: A text cannot be tokenized; the message names the example.
        ModelError: The tokenizer is not a fast one, or fails.
        OptionError: `overlap` is below 1, or `window_tokens` leaves no room beside it and the special tokens.
    """
    backend = fast_backend(tokenizer)
    check_window(backend, window_tokens=window_tokens, overlap=overlap)
    return _tokenized(iter(examples), backend, window_tokens, overlap)


def tokenize_example(
    example: Example, tokenizer: Tokenizer, *, window_tokens: int, overlap: int = 1
) -> list[TokenizedExample]:
    """The windows of one example; see `tokenize_examples`, which is faster for many."""
    return next(tokenize_examples([example], tokenizer, window_tokens=window_tokens, overlap=overlap))


def fast_backend(tokenizer: Tokenizer) -> "Backend":
    """The `tokenizers` object behind a fast tokenizer, set to neither truncate nor pad.

    Raises:
        ModelError: The tokenizer is not a fast one.
    """
    backend: Backend | None = getattr(tokenizer, "backend_tokenizer", None)
    if not tokenizer.is_fast or backend is None:
        raise ModelError(
            f"the tokenizer is a {type(tokenizer).__name__}, which does not tell each token's place in the text; "
            "expected a fast tokenizer; save it with its tokenizer.json"
        )
    backend.no_truncation()
    backend.no_padding()
    # The tokenizer's own choice whether special tokens spelled out in a text are read as such (stubs have no setter).
    backend.encode_special_tokens = bool(getattr(tokenizer, "split_special_tokens", False))  # pyright: ignore[reportAttributeAccessIssue]
    return backend


def check_window(backend: "Backend", *, window_tokens: int, overlap: int) -> None:
    """Refuse windows that could never go on.

    Raises:
        OptionError: `overlap` is below 1, or `window_tokens` leaves no room beside it and the special tokens.
    """
    special = backend.num_special_tokens_to_add(False)
    if overlap < 1:
        raise OptionError(f"--overlap {overlap}: expected at least 1, so that a window's first target has a context")
    if window_tokens < special + overlap + 1:
        raise OptionError(
            f"--window-tokens {window_tokens}: expected at least {special + overlap + 1}, for {special} special "
            f"tokens, {overlap} of overlap and one target"
        )


def encode(backend: "Backend", text: str, what: str) -> "Encoding":
    """The text's tokens with their places in it and the special tokens around it; `what` names it in messages.

    Raises:
        CorpusError: The text holds half a surrogate pair.
        ModelError: The tokenizer fails.
    """
    try:
        return backend.encode(encodable(text, f"{what}: the text"))
    except CorpusError:
        raise
    except Exception as error:  # the tokenizers library raises bare exceptions
        reason = one_line(error)
        raise ModelError(
            f"{what}: the tokenizer cannot read it ({reason}); expected one that reads any text"
        ) from error


def special_around(encoding: "Encoding") -> tuple[int, int]:
    """How many tokens the tokenizer put before the text, and how many after it."""
    mask = encoding.special_tokens_mask
    before = next((place for place, special in enumerate(mask) if not special), len(mask))
    after = next((place for place, special in enumerate(reversed(mask)) if not special), 0)
    return before, after


def _tokenized(
    examples: Iterator[Example], backend: "Backend", window_tokens: int, overlap: int
) -> Iterator[list[TokenizedExample]]:
    special = backend.num_special_tokens_to_add(False)
    for batch in _batches(examples):
        for example, token_ids in zip(batch, _token_ids(backend, batch), strict=True):
            if len(token_ids) > window_tokens:
                encoding = encode(backend, example.text, f"example {example.example_id}")
                yield _windows(example, encoding, window_tokens, overlap)
            elif len(token_ids) == special or len(token_ids) < 2:
                yield []
            else:
                yield [_whole(example, token_ids)]


def _batches(examples: Iterator[Example]) -> Iterator[list[Example]]:
    """Examples in groups that keep the tokenizer busy and memory bounded."""
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
    """Each text's tokens, special tokens included."""
    try:
        # Faster than `encode_batch`, for it keeps no places; they are looked up again for the few texts that need them.
        return [encoding.ids for encoding in backend.encode_batch_fast([example.text for example in batch])]
    except Exception:  # once more one by one, to name the example
        return [encode(backend, example.text, f"example {example.example_id}").ids for example in batch]


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


def _windows(example: Example, encoding: "Encoding", window_tokens: int, overlap: int) -> list[TokenizedExample]:
    """The windows of a text that does not fit one."""
    before, after = special_around(encoding)
    token_ids = np.array(encoding.ids, dtype=np.int32)
    prefix, stream = token_ids[:before], token_ids[before:]
    offsets = encoding.offsets[before : len(token_ids) - after]
    capacity = window_tokens - before
    step = capacity - overlap
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
    """Where the text of tokens `start` to `stop` stands; the first and last windows reach the text's ends."""
    first = 0 if start == 0 else offsets[start][0] if start < len(offsets) else characters
    return slice(first, offsets[stop - 1][1] if stop < len(offsets) else characters)
