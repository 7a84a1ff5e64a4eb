"""Character span of each token of an example in its text."""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import Tokenizer as Backend

from trackstar.corpus import TokenizedExample, Tokenizer
from trackstar.corpus.tokenization import encode, fast_backend

# A token's text is searched up to this many bytes after its expected position: a window can begin
# within a character.
_REACH = 8


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TextSpan:
    """Half-open range of characters of an example's text.

    Attributes:
        start: The first character.
        stop: The character after the last; equal to `start` for a token without text.
    """

    start: int
    stop: int


def token_spans(example: TokenizedExample, tokenizer: Tokenizer) -> tuple[TextSpan, ...]:
    """The span of each token of the example in `example.text`.

    The text is tokenized once more. If that gives the example's token ids, the tokenizer's offsets
    are the spans. A window of a long example can begin or end within what its text alone makes one
    token; its tokens are then searched one after the other by their texts, and a token that is not
    found gets an empty span at the end of the one before it.

    Neither `start` nor `stop` decreases from token to token or exceeds the text. Tokens that are
    parts of one character all have that character's span. Special tokens that the tokenizer put
    around the text have empty spans.

    Args:
        example: A window of a training example, or a query.
        tokenizer: The tokenizer that it was tokenized with.

    Raises:
        CorpusError: The text holds half a surrogate pair.
        ModelError: The tokenizer is not a fast one, or fails.
    """
    backend = fast_backend(tokenizer)
    encoded = encode(backend, example.text, f"example {example.example_id}")
    before = encoded.before
    token_ids, count = example.token_ids.tolist(), len(example.token_ids)
    if encoded.token_ids[:count] != token_ids:  # a rendered chat has its special tokens in its text
        bare = encode(backend, example.text, f"example {example.example_id}", special_tokens=False)
        if bare.token_ids[:count] == token_ids:
            encoded, before = bare, 0
    # Only a prefix is compared: a query, and a window that is not the last, lack the special tokens
    # after the text; a window that ends within a character lacks that character's last bytes.
    if encoded.token_ids[:count] == token_ids:
        offsets = encoded.offsets[:count]
    else:
        if token_ids[:before] != encoded.token_ids[:before]:
            before = 0
        before = min(before, count)
        offsets = [(0, 0)] * before + _search(example.text, [_token_bytes(backend, t) for t in token_ids[before:]])
    return _in_order(offsets)


def _in_order(offsets: Iterable[tuple[int, int]]) -> tuple[TextSpan, ...]:
    """Spans that never decrease; an empty range becomes an empty span at the end of the one before it."""
    spans, start, stop = [], 0, 0
    for first, end in offsets:
        if end > first:
            start, stop = max(start, first), max(stop, end)
        else:
            start = stop
        spans.append(TextSpan(start=start, stop=stop))
    return tuple(spans)


def _search(text: str, tokens: Sequence[bytes]) -> list[tuple[int, int]]:
    """Character ranges of consecutive tokens, each searched from the end of the one before it.

    (0, 0) marks a token that is not found. White space skipped before a token belongs to it: the
    text's and the token's white space differ if the tokenizer prepends a space or changes spaces.
    """
    data = text.encode()
    characters = [position for position, letter in enumerate(text) for _ in letter.encode()]  # by byte
    ranges = []
    end = missed_bytes = 0  # of the last token found; of the tokens missed since
    for token in tokens:
        pattern = token if data.startswith(token, end) else token.lstrip() or token
        # Missed tokens, such as normalised ones, still take up text: the next one is further on.
        start = data.find(pattern, end, end + len(pattern) + _REACH + 2 * missed_bytes) if pattern else -1
        if start < 0:
            missed_bytes += len(pattern)
            ranges.append((0, 0))
            continue
        first = end if data[end:start].isspace() else start
        end, missed_bytes = start + len(pattern), 0
        ranges.append((characters[first], characters[end - 1] + 1))
    return ranges


def _token_bytes(backend: Backend, token_id: int) -> bytes:
    """UTF-8 of the text that a token alone decodes to, which may be part of a character."""
    added = backend.get_added_tokens_decoder().get(token_id)
    token = backend.id_to_token(token_id) if added is None else added.content
    decoder: Any = backend.decoder
    if token is None or decoder is None or added is not None:
        return (token or "").encode()
    # Probe the decoder for the byte-level alphabet (a space is spelled Ġ) and for byte fallback.
    if decoder.decode(["Ġ"]) == " " and all(letter in _BYTES for letter in token):
        return bytes(_BYTES[letter] for letter in token)
    byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
    if byte and decoder.decode(["<0x41>"]) == "A":
        return bytes([int(byte[1], 16)])
    # Decode after another token: some decoders drop the space before the first one.
    return decoder.decode(["a", token]).removeprefix("a").encode()


def _byte_letters() -> dict[str, int]:
    """GPT-2's byte-level alphabet: printable bytes are their own letters, others are numbered from 256."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + number): byte for number, byte in enumerate(others)}


_BYTES = _byte_letters()
