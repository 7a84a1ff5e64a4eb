"""Pack examples into rows of equal length, as training on packed sequences reads them.

The token streams of the examples follow one another, each ended by the tokenizer's end-of-text
token, and are cut every N tokens. A row is an example of its own. The last row may be shorter.
"""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any, final

import numpy as np

from trackstar.corpus.records import Example, TokenSequence
from trackstar.corpus.tokenization import Tokenizer, token_sequences
from trackstar.errors import ModelError, check_at_least


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RowPart:
    """The part of a packed row that one example fills.

    Attributes:
        example_id: Name of the example.
        start: The first of its tokens in the row.
        stop: The token after the last.
        metadata: The example's metadata, as a JSON object, or nothing.
    """

    example_id: str
    start: int
    stop: int
    metadata: str


@final
class Packing:
    """Packs examples into rows of `tokens` tokens.

    Args:
        tokens: Number of tokens of a row; at least 2.
        tokenizer: The model's tokenizer, which has an end-of-text token.

    Raises:
        OptionError: `tokens` is below 2.
        ModelError: The tokenizer has no end-of-text token.
    """

    def __init__(self, tokens: int, tokenizer: Tokenizer) -> None:
        check_at_least("pack", tokens, 2)
        end: Any = getattr(tokenizer, "eos_token_id", None)
        if end is None:
            raise ModelError(
                "the tokenizer has no end-of-text token, which packed examples are joined with; set its `eos_token`, "
                "or leave `pack` out"
            )
        self.tokens = tokens
        self._end = int(end)
        self._tokenizer = tokenizer

    def rows(self, examples: Iterator[Example], *, first_row: int = 0) -> Iterator[Example]:
        """The rows in order; their records are numbered from 0, and their names from `first_row`."""
        ids, mask = np.empty(0, dtype=np.int32), np.empty(0, dtype=bool)
        parts: list[RowPart] = []
        row = 0
        for example, sequence in token_sequences(examples, self._tokenizer):
            new_ids, new_mask = self._ended(sequence)
            if not len(new_ids):
                continue
            start = len(ids)
            ids, mask = np.concatenate([ids, new_ids]), np.concatenate([mask, new_mask])
            parts.append(RowPart(example_id=example.example_id, start=start, stop=len(ids), metadata=example.metadata))
            whole = len(ids) // self.tokens
            for number in range(whole):
                first = number * self.tokens
                cut = slice(first, first + self.tokens)
                yield _row(ids[cut], mask[cut], _cut(parts, first, self.tokens), row, first_row)
                row += 1
            if whole:
                first = whole * self.tokens
                ids, mask, parts = ids[first:], mask[first:], _cut(parts, first, self.tokens)
        if len(ids):
            yield _row(ids, mask, parts, row, first_row)

    def _ended(self, sequence: TokenSequence) -> tuple[np.ndarray, np.ndarray]:
        """A stream that ends with the end-of-text token, which is a target if the token before it is."""
        ids, mask = sequence.token_ids, sequence.target_mask
        if len(ids) and int(ids[-1]) != self._end:
            ids = np.append(ids, np.int32(self._end))
            mask = np.append(mask, mask[-1])
        return ids, mask


def _cut(parts: list[RowPart], first: int, tokens: int) -> list[RowPart]:
    """The parts of the row that begins at token `first`."""
    found = []
    for part in parts:
        start, stop = max(part.start - first, 0), min(part.stop - first, tokens)
        if start < stop:
            found.append(dataclasses.replace(part, start=start, stop=stop))
    return found


def _row(ids: np.ndarray, mask: np.ndarray, parts: list[RowPart], row: int, first_row: int) -> Example:
    target_mask = mask.copy()
    target_mask[:1] = False
    described = []
    for part in parts:
        entry: dict[str, Any] = {"id": part.example_id, "start": part.start, "stop": part.stop}
        if part.metadata:
            entry["metadata"] = json.loads(part.metadata)
        described.append(entry)
    return Example(
        example_id=f"row:{first_row + row}",
        text="",
        record=row,
        tokens=TokenSequence(token_ids=ids.copy(), target_mask=target_mask),
        metadata=json.dumps({"parts": described}, ensure_ascii=False, separators=(",", ":")),
    )
