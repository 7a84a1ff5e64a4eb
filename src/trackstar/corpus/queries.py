"""Queries: read from JSON lines, and tokenized so that only the completion's tokens are targets."""

import os
from collections.abc import Mapping, Sequence

import numpy as np

from trackstar.corpus.data_files import find_files, one_line, raw_lines
from trackstar.corpus.fields import encodable, json_object
from trackstar.corpus.records import Query, TokenizedExample
from trackstar.corpus.tokenization import Tokenizer, check_window, encode, fast_backend, special_around
from trackstar.errors import CorpusError

PROMPT_FIELDS = ("prompt", "prompt0", "inputs_plaintext")
"""Fields that hold a prompt, tried in this order: plain queries, the public release's facts, its results."""
COMPLETION_FIELDS = ("completion", "entity1", "targets_plaintext")
ID_FIELDS = ("query_id", "fact_id", "example_id", "id")


def read_queries(
    path: str | os.PathLike[str], *, prompt_field: str | None = None, needs_completion: bool = True
) -> list[Query]:
    """Read queries from JSON lines (.jsonl, .ndjson or .json; plain, .gz or .zst), a folder or a glob of them.

    A line has a prompt and a completion as `prompt` and `completion`, or as the public release's facts do (`prompt0`,
    `prompt1`, `prompt2`; `entity1`), or as its results do (`inputs_plaintext`; `targets_plaintext`). Its name is the
    first of `ID_FIELDS` that it has, else `STEM:LINE` with the line's place from 0.

    Args:
        path: Where they are.
        prompt_field: The field that holds the prompt; None is the first of `PROMPT_FIELDS` that a line has.
        needs_completion: Whether a line without a completion is refused; else it gives an empty one, which somebody
            else, such as the model itself, must then fill in.

    Raises:
        CorpusError: A line is not a query, names a query that another one names, or there is none; the message
            names file and line.
    """
    name = os.fspath(path)
    place = find_files(name)
    if place.dataset or place.files[0].format != "jsonl":
        raise CorpusError(f"{place.name}: not JSON lines; queries are read from .jsonl (plain, .gz or .zst)")
    queries: list[Query] = []
    seen: dict[str, str] = {}
    for file in place.files:
        for number, line in raw_lines(file):
            where = f"{file.name}:{number}"
            fields = json_object(line, where)
            query = _query(fields, where, prompt_field, f"{file.stem}:{len(queries)}", needs_completion)
            if query.query_id in seen:
                raise CorpusError(
                    f'{where}: query "{one_line(query.query_id)}" is also at {seen[query.query_id]}; name each once'
                )
            seen[query.query_id] = where
            queries.append(query)
    if not queries:
        raise CorpusError(f"{place.name}: holds no query; expected at least one line that is not blank")
    return queries


def query_text(query: Query) -> str:
    """Prompt and completion as the model reads them: one space between where neither has white space there."""
    return query.prompt + _joint(query) + query.completion


def tokenize_query(query: Query, tokenizer: Tokenizer, *, window_tokens: int) -> TokenizedExample:
    """Tokenize prompt and completion together; the completion's tokens are the targets.

    Special tokens stand before the text as in training, none after it, and no chat template is applied. A token
    counts when any of its characters is the completion's; the space that joins the two is. Where the two are too
    long, the prompt loses its beginning: the returned text is then shorter than `query_text`.

    Args:
        query: What to tokenize.
        tokenizer: The model's.
        window_tokens: Most tokens, special tokens included.

    Raises:
        CorpusError: The completion is empty, too long, or begins where nothing is before it; the message names the
            query.
        ModelError: The tokenizer is not a fast one, or fails.
        OptionError: `window_tokens` leaves no room for a target.
    """
    what = f"query {one_line(query.query_id)}"
    if not query.completion.strip():
        raise CorpusError(f"{what}: the completion is empty; expected the text whose probability is to be explained")
    backend = fast_backend(tokenizer)
    check_window(backend, window_tokens=window_tokens, overlap=1)
    text = query_text(query)
    encoding = encode(backend, text, what)
    before, after = special_around(encoding)
    offsets = encoding.offsets[before : len(encoding.ids) - after]
    token_ids = np.array(encoding.ids[: before + len(offsets)], dtype=np.int32)
    first = next((place for place, (_, stop) in enumerate(offsets) if stop > len(query.prompt)), len(offsets))
    targets = len(offsets) - first
    cut = max(0, len(token_ids) - window_tokens)
    _check_targets(what, targets, context=before + first, room=window_tokens - max(before, 1))
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
    """The tokens of a prompt that the model is to go on from: special tokens before it as in training, none after.

    Raises:
        CorpusError: The prompt holds half a surrogate pair.
        ModelError: The tokenizer is not a fast one, or fails.
    """
    # Around an empty text, the tokens before and after could not be told apart.
    encoding = encode(fast_backend(tokenizer), prompt or "a", "prompt")
    before, after = special_around(encoding)
    return encoding.ids[: len(encoding.ids) - after if prompt else before]


def _check_targets(what: str, targets: int, *, context: int, room: int) -> None:
    if not targets:
        raise CorpusError(f"{what}: the tokenizer makes no token of the completion; expected at least one")
    if targets > room:
        raise CorpusError(f"{what}: the completion has {targets} tokens, and {room} fit the window; shorten it")
    if not context:
        raise CorpusError(
            f"{what}: the prompt is empty and the tokenizer puts nothing before it, so that the completion's first "
            "token is predicted from nothing; give a prompt"
        )


def _joint(query: Query) -> str:
    apart = not query.prompt or query.prompt[-1].isspace() or query.completion[:1].isspace()
    return "" if apart else " "


def _query(
    line: Mapping[str, object], where: str, prompt_field: str | None, fallback: str, needs_completion: bool
) -> Query:
    prompt = _text(line, PROMPT_FIELDS if prompt_field is None else (prompt_field,), where, "prompt")
    if not needs_completion and not any(name in line for name in COMPLETION_FIELDS):
        return Query(query_id=_name(line, where) or fallback, prompt=prompt, completion="", record=line)
    completion = _text(line, COMPLETION_FIELDS, where, "completion")
    if needs_completion and not completion.strip():
        raise CorpusError(f"{where}: the completion is empty; expected the text whose probability is to be explained")
    return Query(query_id=_name(line, where) or fallback, prompt=prompt, completion=completion, record=line)


def _text(line: Mapping[str, object], fields: Sequence[str], where: str, what: str) -> str:
    field = next((name for name in fields if name in line), None)
    if field is None:
        found = one_line(", ".join(list(line)[:12])) or "no fields"
        raise CorpusError(f"{where}: no {what}; expected a field {' or '.join(fields)}; found {found}")
    value = line[field]
    if not isinstance(value, str):
        raise CorpusError(f'{where}: field "{field}" is of type {type(value).__name__}; expected a string')
    return encodable(value, f'{where}: field "{field}"')


def _name(line: Mapping[str, object], where: str) -> str | None:
    field = next((name for name in ID_FIELDS if name in line), None)
    if field is None:
        return None
    value = line[field]
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise CorpusError(f'{where}: field "{field}" does not name the query; expected a string or a whole number')
    return encodable(str(value), f'{where}: field "{field}"')
