"""Where each token of an example stands in its text."""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import Tokenizer as Backend

from trackstar.corpus import TokenizedExample, Tokenizer
from trackstar.corpus.tokenization import encode, fast_backend, special_around

# How far beyond where it is expected a token's text is looked for, in bytes: a window can begin amid a character.
_REACH = 8


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TextSpan:
    """Where a token stands in its example's text, in characters, half-open.

    Attributes:
        start: Its first character.
        stop: The character after its last; `start` again for a token that stands for none of the text.
    """

    start: int
    stop: int


def token_spans(example: TokenizedExample, tokenizer: Tokenizer) -> tuple[TextSpan, ...]:
    """Where each token of the example stands in `example.text`.

    The text is tokenized again. Where that gives the example's own tokens, the tokenizer's offsets are used. A window
    of a long document can begin or end amid what is one token of its text by itself: its tokens are then found one
    after the other by their own texts, and one that cannot be found gets the empty span where the one before it ends.

    Spans follow each other: neither `start` nor `stop` ever decreases, or exceeds the text. Tokens that are parts of
    one character have that character's span each; special tokens that the tokenizer has put around the text have empty
    ones.

    Args:
        example: A training example's window, or a query.
        tokenizer: The one that it was tokenized with.

    Raises:
        CorpusError: The text holds half a surrogate pair.
        ModelError: The tokenizer is not a fast one, or fails.
    """
    backend = fast_backend(tokenizer)
    encoding = encode(backend, example.text, f"example {example.example_id}")
    before, _ = special_around(encoding)
    token_ids, count = example.token_ids.tolist(), len(example.token_ids)
    # A query, or a window with others after it, lacks the special tokens after the text; a window that ends amid a
    # character, whose text holds all of that, lacks its last bytes.
    if encoding.ids[:count] == token_ids:
        places = encoding.offsets[:count]
    else:
        if token_ids[:before] != encoding.ids[:before]:
            before = 0
        before = min(before, count)
        places = [(0, 0)] * before + _found(example.text, [_token_bytes(backend, t) for t in token_ids[before:]])
    return _in_order(places)


def _in_order(places: Iterable[tuple[int, int]]) -> tuple[TextSpan, ...]:
    """Spans that never decrease; an empty place becomes the empty span where the one before it ends."""
    spans, start, stop = [], 0, 0
    for first, end in places:
        if end > first:
            start, stop = max(start, first), max(stop, end)
        else:
            start = stop
        spans.append(TextSpan(start=start, stop=stop))
    return tuple(spans)


def _found(text: str, tokens: Sequence[bytes]) -> list[tuple[int, int]]:
    """Where tokens stand in a text, in characters, each looked for from where the one before it ends.

    (0, 0) stands for a token that is not found. White space skipped before a token belongs to it: that in the text and
    that in the token need not be the same where the tokenizer puts a space before the text, or changes spaces.
    """
    data = text.encode()
    character = [place for place, letter in enumerate(text) for _ in letter.encode()]
    places = []
    at = lost = 0
    for token in tokens:
        # After tokens that were not found, such as normalised ones, the next one stands further on.
        wanted = token if data.startswith(token, at) else token.lstrip() or token
        found = data.find(wanted, at, at + len(wanted) + _REACH + 2 * lost) if wanted else -1
        if found < 0:
            lost += len(wanted)
            places.append((0, 0))
            continue
        first = at if data[at:found].isspace() else found
        at, lost = found + len(wanted), 0
        places.append((character[first], character[at - 1] + 1))
    return places


def _token_bytes(backend: Backend, token_id: int) -> bytes:
    """The text that a token stands for by itself, in UTF-8: possibly a part of a character."""
    added = backend.get_added_tokens_decoder().get(token_id)
    token = backend.id_to_token(token_id) if added is None else added.content
    decoder: Any = backend.decoder
    if token is None or decoder is None or added is not None:
        return (token or "").encode()
    # A decoder is asked what it makes of a space spelled as byte-level tokenizers do, and of a byte spelled out.
    if decoder.decode(["Ġ"]) == " " and all(letter in _BYTES for letter in token):
        return bytes(_BYTES[letter] for letter in token)
    byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
    if byte and decoder.decode(["<0x41>"]) == "A":
        return bytes([int(byte[1], 16)])
    # After another token, for some decoders drop the space before a text's first one.
    return decoder.decode(["a", token]).removeprefix("a").encode()


def _byte_letters() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones stand for themselves, the others are numbered from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_letters()
