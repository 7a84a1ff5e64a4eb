"""One tokenized example as a line of text with its targets marked, for a person to check."""

import itertools

from trackstar.corpus.corpus import Corpus
from trackstar.corpus.reading import other_form
from trackstar.corpus.records import TokenizedExample
from trackstar.corpus.token_spans import token_spans
from trackstar.corpus.tokenization import Tokenizer, tokenize_examples
from trackstar.text import one_line, printable

BEGIN, END = "⟦", "⟧"
"""What stands before and behind a run of targets."""

_MOST_RECORDS = 64
_MOST_CHARACTERS = 160
_MOST_SEGMENTS = 9


def first_example(corpus: Corpus, tokenizer: Tokenizer, window_tokens: int, *, truncate: bool = False) -> str | None:
    """A line that shows the first example with a target; None if none of the first records has one.

    Raises:
        CorpusError: A record cannot be read or tokenized.
    """
    examples = itertools.islice(corpus.examples(), _MOST_RECORDS)
    tokenized = tokenize_examples(examples, tokenizer, window_tokens=window_tokens, truncate=truncate)
    window = next((parts[0] for parts in tokenized if parts), None)
    if window is None:
        return None
    reading = corpus.reading
    targets = int(window.target_mask.sum())
    other = other_form(reading, corpus.source.field_names())
    also = f"; its fields are also those of the form {other}, which `format` chooses" if other else ""
    return (
        f"first example {one_line(window.example_id, 60)} ({reading.format}, train on {reading.train_on}; {targets} of "
        f"{len(window.token_ids)} tokens are targets, between {BEGIN} and {END}{also}): {marked(window, tokenizer)}"
    )


def marked(example: TokenizedExample, tokenizer: Tokenizer) -> str:
    """The example's text on one line, its targets between brackets; long parts are cut in the middle."""
    is_target = [False] * len(example.text)
    for span, target in zip(token_spans(example, tokenizer), example.target_mask.tolist(), strict=True):
        if target:
            is_target[span.start : span.stop] = [True] * (span.stop - span.start)
    segments = []
    for target, places in itertools.groupby(range(len(example.text)), key=is_target.__getitem__):
        indices = list(places)
        text = _cut(_visible(example.text[indices[0] : indices[-1] + 1]))
        segments.append(f"{BEGIN}{text}{END}" if target else text)
    return "".join(segments[:_MOST_SEGMENTS]) + (" …" if len(segments) > _MOST_SEGMENTS else "")


def _visible(text: str) -> str:
    """The text without characters that could move a terminal's cursor; line ends are shown."""
    return printable(text.replace("\r\n", "\n").replace("\n", "⏎"))


def _cut(text: str) -> str:
    half = _MOST_CHARACTERS // 2
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:half]} … {text[-half:]}"
