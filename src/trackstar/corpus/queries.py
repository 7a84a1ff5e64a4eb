"""Queries z_q: read from JSON lines, and tokenized with the completion's tokens as targets."""

import os
from collections.abc import Mapping, Sequence

import numpy as np

from trackstar.corpus.data_files import find_files, raw_lines
from trackstar.corpus.fields import check_writable, encodable, json_object
from trackstar.corpus.records import Query, TokenizedExample
from trackstar.corpus.tokenization import Tokenizer, check_window, count_special_tokens, encode, fast_backend
from trackstar.errors import CorpusError
from trackstar.text import one_line

PROMPT_FIELDS = ("prompt", "prompt0", "inputs_plaintext")
"""Fields that hold a prompt, tried in this order: plain queries, the public release's facts, its results."""
COMPLETION_FIELDS = ("completion", "entity1", "targets_plaintext")
"""Fields that hold a completion, in the same order."""
ID_FIELDS = ("query_id", "fact_id", "example_id", "id")
"""Fields that name a query, tried in this order."""


def read_queries(
    path: str | os.PathLike[str], *, prompt_field: str | None = None, needs_completion: bool = True
) -> list[Query]:
    """Read queries from JSON lines (.jsonl, .ndjson or .json; plain, .gz or .zst), a folder or a
    glob.

    A line holds a prompt and a completion, as `prompt` and `completion`, or as in the public
    release's facts (`prompt0`, `prompt1`, `prompt2`; `entity1`), or as in its results
    (`inputs_plaintext`; `targets_plaintext`). Its name is the first of `ID_FIELDS` that it has,
    else `STEM:LINE`, lines counted from 0.

    Args:
        path: File, folder, glob or URL.
        prompt_field: Field that holds the prompt; None is the first of `PROMPT_FIELDS` that a line
            has.
        needs_completion: Whether to refuse a line without a completion. If not, its completion is
            empty and must be filled in, for example with the model's output.

    Raises:
        CorpusError: A line is not a query, two lines have the same name, a field holds something
            that results cannot repeat (NaN, half a surrogate pair), or there is no query; the
            message names file and line.
    """
    data_files = find_files(os.fspath(path))
    if data_files.dataset or data_files.files[0].format != "jsonl":
        raise CorpusError(f"{data_files.name}: not JSON lines; queries are read from .jsonl (plain, .gz or .zst)")
    queries: list[Query] = []
    locations: dict[str, str] = {}
    for file in data_files.files:
        for number, line in raw_lines(file):
            location = f"{file.name}:{number}"
            fields = json_object(line, location)
            check_writable(fields, location)
            query = _query(fields, location, prompt_field, f"{file.stem}:{len(queries)}", needs_completion)
            if query.query_id in locations:
                first = locations[query.query_id]
                raise CorpusError(f'{location}: query "{one_line(query.query_id)}" is also at {first}; name each once')
            locations[query.query_id] = location
            queries.append(query)
    if not queries:
        raise CorpusError(f"{data_files.name}: holds no query; expected at least one line that is not blank")
    return queries


def query_text(query: Query) -> str:
    """The model's input: prompt and completion, joined by a space unless white space separates them."""
    return query.prompt + _separator(query) + query.completion


def tokenize_query(query: Query, tokenizer: Tokenizer, *, window_tokens: int) -> TokenizedExample:
    """Tokenize prompt and completion together; the completion's tokens are the targets.

    Special tokens precede the text as in training, none follow it, and no chat template is applied.
    A token is a target if any of its characters belongs to the completion, which includes the space
    that joins the two. A query longer than the window loses the beginning of its prompt; the
    returned text is then shorter than `query_text`.

    Args:
        query: Query to tokenize.
        tokenizer: The model's tokenizer.
        window_tokens: Most tokens, special tokens included.

    Raises:
        CorpusError: The completion is empty, too long, or has no context; the message names the
            query.
        ModelError: The tokenizer is not a fast one, or fails.
        OptionError: `window_tokens` leaves no room for a target.
    """
    description = f"query {one_line(query.query_id)}"
    if not query.completion.strip():
        raise CorpusError(
            f"{description}: the completion is empty; expected the text whose probability is to be explained"
        )
    backend = fast_backend(tokenizer)
    check_window(backend, window_tokens=window_tokens, overlap=1)
    text = query_text(query)
    encoding = encode(backend, text, description)
    before, after = count_special_tokens(encoding)
    offsets = encoding.offsets[before : len(encoding.ids) - after]
    token_ids = np.array(encoding.ids[: before + len(offsets)], dtype=np.int32)
    first = next((position for position, (_, stop) in enumerate(offsets) if stop > len(query.prompt)), len(offsets))
    targets = len(offsets) - first
    cut = max(0, len(token_ids) - window_tokens)
    _check_targets(description, targets, context=before + first, room=window_tokens - max(before, 1))
    target_mask = np.zeros(len(token_ids) - cut, dtype=bool)
    target_mask[-targets:] = True
    return TokenizedExample(
        example_id=query.query_id,
        parent_id=query.query_id,
        record=0,
        window=0,
        text=text[offsets[cut][0] if cut else 0 :],
        token_ids=np.concatenate([token_ids[:before], token_ids[before + cut :]]),
        target_mask=target_mask,
    )


def prompt_tokens(prompt: str, tokenizer: Tokenizer) -> list[int]:
    """The tokens of a prompt to generate from: special tokens precede it as in training, none
    follow.

    Raises:
        CorpusError: The prompt holds half a surrogate pair.
        ModelError: The tokenizer is not a fast one, or fails.
    """
    # An empty text would not separate the special tokens before it from those after it.
    encoding = encode(fast_backend(tokenizer), prompt or "a", "prompt")
    before, after = count_special_tokens(encoding)
    return encoding.ids[: len(encoding.ids) - after if prompt else before]


def _check_targets(description: str, targets: int, *, context: int, room: int) -> None:
    if not targets:
        raise CorpusError(f"{description}: the completion has no token; expected at least one")
    if targets > room:
        raise CorpusError(f"{description}: the completion has {targets} tokens, and {room} fit the window; shorten it")
    if not context:
        raise CorpusError(
            f"{description}: the prompt is empty and the tokenizer puts nothing before it, so the completion's first "
            "token has no context; give a prompt"
        )


def _separator(query: Query) -> str:
    separated = not query.prompt or query.prompt[-1].isspace() or query.completion[:1].isspace()
    return "" if separated else " "


def _query(
    line: Mapping[str, object], location: str, prompt_field: str | None, fallback: str, needs_completion: bool
) -> Query:
    prompt = _text(line, PROMPT_FIELDS if prompt_field is None else (prompt_field,), location, "prompt")
    if not needs_completion and not any(name in line for name in COMPLETION_FIELDS):
        return Query(query_id=_name(line, location) or fallback, prompt=prompt, completion="", record=line)
    completion = _text(line, COMPLETION_FIELDS, location, "completion")
    if needs_completion and not completion.strip():
        raise CorpusError(
            f"{location}: the completion is empty; expected the text whose probability is to be explained"
        )
    return Query(query_id=_name(line, location) or fallback, prompt=prompt, completion=completion, record=line)


def _text(line: Mapping[str, object], fields: Sequence[str], location: str, part: str) -> str:
    field = next((name for name in fields if name in line), None)
    if field is None:
        field_names = one_line(", ".join(list(line)[:12])) or "no fields"
        raise CorpusError(f"{location}: no {part}; expected a field {' or '.join(fields)}; found {field_names}")
    value = line[field]
    if not isinstance(value, str):
        raise CorpusError(f'{location}: field "{field}" is of type {type(value).__name__}; expected a string')
    return encodable(value, f'{location}: field "{field}"')


def _name(line: Mapping[str, object], location: str) -> str | None:
    field = next((name for name in ID_FIELDS if name in line), None)
    if field is None:
        return None
    value = line[field]
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise CorpusError(f'{location}: field "{field}" does not name the query; expected a string or a whole number')
    return encodable(str(value), f'{location}: field "{field}"')
