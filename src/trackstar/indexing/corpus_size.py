"""The size of a corpus as a model reads it: examples, tokens and bytes, counted or from a sample."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator

from trackstar.corpus import Corpus, Example, TokenizedExample, tokenize_examples
from trackstar.model.language_model import LanguageModel
from trackstar.store import WindowsEntry

_COUNTED_RECORDS = 4096
"""A corpus of at most so many records is tokenized whole."""
_SPANS, _SPAN_RECORDS = 8, 256
"""Of a larger one, records at so many places are tokenized, evenly apart, so many at each."""
_KEPT = 512
"""Windows that are kept for the first batch: as many as gradients are computed of at once."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CorpusSize:
    """The size of a corpus.

    Attributes:
        records: Number of records.
        examples: Number of examples: the windows of all records.
        tokens: Number of their tokens.
        string_bytes: Bytes of their texts, names and metadata.
        sampled: Number of records that the other numbers are extrapolated from; None if all were counted.
        windows: Some of the examples.
    """

    records: int
    examples: int
    tokens: int
    string_bytes: int
    sampled: int | None
    windows: tuple[TokenizedExample, ...] = dataclasses.field(repr=False)

    def __str__(self) -> str:
        about, how = ("", "counted") if self.sampled is None else ("about ", f"from {self.sampled:,} of the records")
        return f"{self.records:,} records, {about}{self.examples:,} examples with {self.tokens:,} tokens ({how})"


def corpus_size(corpus: Corpus, model: LanguageModel, windows: WindowsEntry) -> CorpusSize:
    """The size of a corpus, which is read for a count of its records, and in part to be tokenized.

    Args:
        corpus: The corpus.
        model: The model, for its tokenizer.
        windows: How documents are split.

    Raises:
        CorpusError: A record cannot be read.
    """
    documents = dataclasses.replace(corpus, packing=None)
    total = documents.count()
    assert total is not None, "only packed examples are not counted"
    whole = total <= _COUNTED_RECORDS
    read = documents.examples() if whole else _spans(documents, total)
    # Packed documents are joined before they are split.
    tokens = model.context_tokens if corpus.packing is not None else windows.tokens
    records = examples = token_count = string_bytes = 0
    kept: list[TokenizedExample] = []
    for parts in _tokenized(read, model, windows, tokens):
        records += 1
        examples += len(parts)
        token_count += sum(len(part.token_ids) for part in parts)
        string_bytes += sum(map(_string_bytes, parts))
        kept += parts[: _KEPT - len(kept)]
    factor = total / max(1, records)
    size = CorpusSize(
        records=total,
        examples=round(examples * factor),
        tokens=round(token_count * factor),
        string_bytes=round(string_bytes * factor),
        sampled=None if whole else records,
        windows=tuple(kept),
    )
    return size if corpus.packing is None else _packed(size, corpus.packing.tokens)


def _packed(size: CorpusSize, row: int) -> CorpusSize:
    """The size of documents that are packed into rows of some tokens, an end-of-text token after each."""
    tokens = size.tokens + size.records
    return dataclasses.replace(size, examples=-(-tokens // row), tokens=tokens)


def _tokenized(
    examples: Iterable[Example], model: LanguageModel, windows: WindowsEntry, tokens: int
) -> Iterator[list[TokenizedExample]]:
    return tokenize_examples(
        examples, model.tokenizer, window_tokens=tokens, overlap=windows.overlap, truncate=windows.truncate
    )


def _spans(corpus: Corpus, records: int) -> Iterator[Example]:
    """Records at places evenly apart, in order."""
    for span in range(_SPANS):
        start = span * (records - _SPAN_RECORDS) // (_SPANS - 1)
        yield from itertools.islice(corpus.examples(start), _SPAN_RECORDS)


def _string_bytes(example: TokenizedExample) -> int:
    strings = (example.text, example.example_id, example.parent_id, example.metadata)
    return sum(len(string.encode("utf-8", "surrogatepass")) for string in strings)
