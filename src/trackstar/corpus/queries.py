"""Queries z_q: read from JSON lines, and tokenized with the completion's tokens as targets."""

import dataclasses
import os
from collections.abc import Mapping, Sequence

import numpy as np

from trackstar.choices import JOINS, Join
from trackstar.corpus.data_files import conversion, find_files, raw_lines
from trackstar.corpus.fields import check_writable, encodable, json_object
from trackstar.corpus.joining import joined
from trackstar.corpus.records import Query, TokenizedExample
from trackstar.corpus.tokenization import Tokenizer, check_window, encode, fast_backend
from trackstar.errors import CorpusError, check_choice
from trackstar.text import abridged, one_line

PROMPT_FIELDS = ("prompt", "prompt0", "inputs_plaintext")
"""Fields that hold a prompt, tried in this order: plain queries, the public release's facts, its results."""
COMPLETION_FIELDS = ("completion", "entity1", "targets_plaintext")
"""Fields that hold a completion, in the same order."""
ID_FIELDS = ("query_id", "fact_id", "example_id", "id")
"""Fields that name a query, tried in this order."""
RESULT_ID_FIELDS = ("query_id", "example_id", "fact_id", "id")
"""The same for a line of results, whose `fact_id` is carried from the query."""
NO_TARGET = -100
"""The label of a token that is no target, as in Transformers."""


def read_queries(
    path: str | os.PathLike[str],
    *,
    prompt_field: str | None = None,
    needs_completion: bool = True,
    join: Join = "auto",
) -> list[Query]:
    """Read queries from JSON lines (.jsonl, .ndjson or .json; plain, .gz or .zst), a folder or a
    glob.

    A line holds a prompt and a completion, as `prompt` and `completion`, or as in the public
    release's facts (`prompt0`, `prompt1`, `prompt2`; `entity1`), or as in its results
    (`inputs_plaintext`; `targets_plaintext`). Its name is the first of `ID_FIELDS` that it has,
    else `STEM:LINE`, lines counted from 0. A line with `input_ids` and `labels` (the targets' token
    ids, and -100 elsewhere) is a query of tokens. The field `separator` of earlier results, a space
    or nothing, takes the place of `join`.

    Args:
        path: File, folder, glob or URL.
        prompt_field: Field that holds the prompt; None is the first of `PROMPT_FIELDS` that a line
            has.
        needs_completion: Whether to refuse a line without a completion. If not, its completion is
            empty and must be filled in, for example with the model's output.
        join: How prompts and completions are joined; see `joined`.

    Raises:
        OptionError: `join` is unknown.
        CorpusError: A line is not a query, two lines have the same name, a field holds something
            that results cannot repeat (NaN, half a surrogate pair), or there is no query; the
            message names file and line.
    """
    check_choice("join", join, JOINS)
    data_files = find_files(os.fspath(path))
    if not data_files.dataset and data_files.files[0].format in ("csv", "tsv"):
        raise CorpusError(f"{data_files.name}: not JSON lines, which queries are; {conversion(data_files.files[0])}")
    if data_files.dataset or data_files.files[0].format != "jsonl":
        raise CorpusError(f"{data_files.name}: not JSON lines; queries are read from .jsonl (plain, .gz or .zst)")
    queries: list[Query] = []
    locations: dict[str, str] = {}
    for file in data_files.files:
        for number, line in raw_lines(file):
            location = f"{file.name}:{number}"
            fields = json_object(line, location)
            check_writable(fields, location)
            query = query_of_line(
                fields, location, name=f"{file.stem}:{len(queries)}", prompt_field=prompt_field,
                needs_completion=needs_completion, join=join,
            )  # fmt: skip
            if query.query_id in locations:
                first = locations[query.query_id]
                raise CorpusError(f'{location}: query "{one_line(query.query_id)}" is also at {first}; name each once')
            locations[query.query_id] = location
            queries.append(query)
    if not queries:
        raise CorpusError(f"{data_files.name}: holds no query; expected at least one line that is not blank")
    return queries


def separator(query: Query) -> str:
    """What stands between the prompt and the completion in `query_text`: a space or nothing."""
    return query_text(query)[len(query.prompt) : -len(query.completion) or None] if query.completion else ""


def query_text(query: Query) -> str:
    """The text that the model reads: prompt and completion, joined as the query says."""
    return joined(query.prompt, query.completion, "none" if query.token_ids is not None else query.join)


def tokenize_query(query: Query, tokenizer: Tokenizer, *, window_tokens: int) -> TokenizedExample:
    """The tokens of a query, with the completion's tokens as targets.

    Prompt and completion are tokenized together. Special tokens precede the text as in training,
    none follow it, and no chat template is applied. A token is a target if any of its characters
    belongs to the completion, which includes a space that joins the two. The tokens of a query of
    tokens are taken as they are. A query longer than the window loses the beginning of its prompt;
    the returned text is then shorter than `query_text`.

    Args:
        query: Query to tokenize.
        tokenizer: The model's tokenizer.
        window_tokens: Most tokens, special tokens included.

    Raises:
        CorpusError: The completion is empty, too long, or has no context, or the tokens and the
            target mask do not fit; the message names the query.
        ModelError: The tokenizer is not a fast one, or fails.
        OptionError: `window_tokens` leaves no room for a target.
    """
    description = f"query {one_line(query.query_id)}"
    backend = fast_backend(tokenizer)
    check_window(backend, window_tokens=window_tokens, overlap=1)
    if query.token_ids is not None:
        return _given_tokens(query, tokenizer, window_tokens, description)
    if not query.completion.strip():
        raise CorpusError(
            f"{description}: the completion is empty; expected the text whose probability is to be explained"
        )
    text = query_text(query)
    encoded = encode(backend, text, description)
    before = encoded.before
    offsets = encoded.offsets[before : len(encoded.token_ids) - encoded.after]
    token_ids = np.array(encoded.token_ids[: before + len(offsets)], dtype=np.int32)
    first = next((position for position, (_, stop) in enumerate(offsets) if stop > len(query.prompt)), len(offsets))
    targets = len(offsets) - first
    cut = max(0, len(token_ids) - window_tokens)
    _check_targets(description, targets, context=before + first, room=window_tokens - max(before, 1))
    target_mask = np.zeros(len(token_ids) - cut, dtype=bool)
    target_mask[-targets:] = True
    return _tokenized(
        query,
        text[offsets[cut][0] if cut else 0 :],
        np.concatenate([token_ids[:before], token_ids[before + cut :]]),
        target_mask,
    )


def query_with_texts(query: Query, tokenizer: Tokenizer) -> Query:
    """The query of tokens with the texts of its tokens, if it has none; any other query as it is.

    The completion begins at the first target.

    Raises:
        CorpusError: The tokens and the target mask do not fit.
        ModelError: The tokenizer is not a fast one.
    """
    if query.token_ids is None or query.prompt or query.completion:
        return query
    _, mask = _checked_tokens(query, f"query {one_line(query.query_id)}")
    prompt, completion = token_texts(query.token_ids, int(mask.argmax()), tokenizer)
    return dataclasses.replace(query, prompt=prompt, completion=completion)


def token_texts(token_ids: Sequence[int], start: int, tokenizer: Tokenizer) -> tuple[str, str]:
    """The text of the tokens before position `start`, and that of the others.

    Both together are the text of all tokens, so that the second begins with the white space that
    its first token has. A character whose bytes are divided between the two is in the second.
    Special tokens are spelled out, but for those that the tokenizer puts before every text.

    Raises:
        ModelError: The tokenizer is not a fast one.
    """
    backend = fast_backend(tokenizer)
    leading = prompt_tokens("", tokenizer)
    first = len(leading) if list(token_ids[: len(leading)]) == leading else 0
    whole = backend.decode(list(token_ids[first:]), skip_special_tokens=False)
    prompt = backend.decode(list(token_ids[first:start]), skip_special_tokens=False)
    pairs = enumerate(zip(prompt, whole, strict=False))
    common = next((position for position, (one, other) in pairs if one != other), min(len(prompt), len(whole)))
    return whole[:common], whole[common:]


def prompt_tokens(prompt: str, tokenizer: Tokenizer) -> list[int]:
    """The tokens of a prompt to generate from: special tokens precede it as in training, none
    follow.

    Raises:
        CorpusError: The prompt holds half a surrogate pair.
        ModelError: The tokenizer is not a fast one, or fails.
    """
    # An empty text would not separate the special tokens before it from those after it.
    encoded = encode(fast_backend(tokenizer), prompt or "a", "prompt")
    return encoded.token_ids[: len(encoded.token_ids) - encoded.after if prompt else encoded.before]


def _given_tokens(query: Query, tokenizer: Tokenizer, window_tokens: int, description: str) -> TokenizedExample:
    """A query of tokens, without the first tokens after the leading special one if it is too long."""
    token_ids, mask = _checked_tokens(query, description)
    first = int(mask.argmax())
    cut = max(0, len(token_ids) - window_tokens)
    kept = int(cut > 0 and token_ids[:1].tolist() == prompt_tokens("", tokenizer)[:1])
    if first < kept + cut + (not kept):
        room = window_tokens - 1
        raise CorpusError(
            f"{description}: the tokens from the first target on are {len(token_ids) - first}, and {room} fit the "
            "window; shorten it"
        )
    texts = query_with_texts(query, tokenizer)
    text = query_text(texts)
    if cut:
        text = "".join(token_texts(token_ids[kept + cut :].tolist(), first - kept - cut, tokenizer))
    return _tokenized(
        texts,
        text,
        np.concatenate([token_ids[:kept], token_ids[kept + cut :]]),
        np.concatenate([mask[:kept], mask[kept + cut :]]),
    )


def _checked_tokens(query: Query, description: str) -> tuple[np.ndarray, np.ndarray]:
    """The token ids and the target mask of a query of tokens, checked."""
    token_ids, mask = query.token_ids or (), query.target_mask
    if mask is None or len(mask) != len(token_ids):
        found = "none" if mask is None else f"one of {len(mask)}"
        raise CorpusError(
            f"{description}: has {len(token_ids)} tokens; expected a target mask of as many flags, found {found}"
        )
    wrong = [token for token in token_ids if isinstance(token, bool) or not 0 <= token < 2**31]
    if wrong:
        raise CorpusError(f"{description}: token {abridged(wrong[0])}; expected ids from 0 to 2^31 - 1")
    if not any(mask):
        raise CorpusError(f"{description}: the completion has no token; expected at least one target")
    if mask[0]:
        raise CorpusError(
            f"{description}: its first token is a target, which has no context; put a token before it, or make it "
            "no target"
        )
    return np.array(token_ids, dtype=np.int32), np.array(mask, dtype=bool)


def _tokenized(query: Query, text: str, token_ids: np.ndarray, target_mask: np.ndarray) -> TokenizedExample:
    return TokenizedExample(
        example_id=query.query_id,
        parent_id=query.query_id,
        record=0,
        window=0,
        text=text,
        token_ids=token_ids,
        target_mask=target_mask,
    )


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


def _join(line: Mapping[str, object], location: str) -> Join | None:
    """How earlier results joined prompt and completion; None if the line does not say it."""
    found = line.get("separator")
    if found is None:
        return None
    if found not in ("", " "):
        raise CorpusError(
            f'{location}: field "separator" is {abridged(found)}; expected a space or an empty string, as results '
            "have it"
        )
    return "space" if found else "none"


def query_of_line(
    line: Mapping[str, object],
    location: str,
    *,
    name: str,
    prompt_field: str | None = None,
    needs_completion: bool = True,
    join: Join = "auto",
) -> Query:
    """The query of a line's JSON object; see `read_queries`.

    Args:
        line: The object.
        location: Its location, for messages.
        name: The query's name if the line has none.
        prompt_field: See `read_queries`.
        needs_completion: See `read_queries`.
        join: See `read_queries`.

    Raises:
        CorpusError: It is no query; the message names the location.
    """
    prompt_fields = PROMPT_FIELDS if prompt_field is None else (prompt_field,)
    prompt_name = next((field for field in prompt_fields if field in line), None)
    is_result = prompt_name == PROMPT_FIELDS[-1]  # of the release, or of trackstar
    # A line of results carries its fact's fields, too, such as entity1: its own come first.
    completion_fields = COMPLETION_FIELDS[::-1] if is_result else COMPLETION_FIELDS
    name = _name(line, RESULT_ID_FIELDS if is_result else ID_FIELDS, location) or name
    join = _join(line, location) or join
    has_completion = any(field in line for field in completion_fields)
    if "input_ids" in line and needs_completion:
        query = _query_of_tokens(line, location, name)
        if prompt_name is None or not has_completion:
            return query
        prompt = _text(line, prompt_fields, location, "prompt")
        completion = _text(line, completion_fields, location, "completion")
        return dataclasses.replace(query, prompt=prompt, completion=completion)
    prompt = _text(line, prompt_fields, location, "prompt")
    if not needs_completion and not has_completion:
        return Query(query_id=name, prompt=prompt, completion="", record=line, join=join)
    completion = _text(line, completion_fields, location, "completion")
    if needs_completion and not completion.strip():
        raise CorpusError(
            f"{location}: the completion is empty; expected the text whose probability is to be explained"
        )
    return Query(query_id=name, prompt=prompt, completion=completion, record=line, join=join)


def _query_of_tokens(line: Mapping[str, object], location: str, name: str) -> Query:
    token_ids = _whole_numbers(line, "input_ids", location)
    labels = _whole_numbers(line, "labels", location)
    if len(labels) != len(token_ids):
        raise CorpusError(
            f"{location}: {len(labels)} labels and {len(token_ids)} input_ids; expected as many; a token that is no "
            f"target has the label {NO_TARGET}"
        )
    for position, (token, label) in enumerate(zip(token_ids, labels, strict=True)):
        if label not in (token, NO_TARGET):
            raise CorpusError(
                f"{location}: labels[{position}] is {abridged(label)}; expected input_ids[{position}], "
                f"{abridged(token)}, or {NO_TARGET} for a token that is no target"
            )
    mask = tuple(label != NO_TARGET for label in labels)
    query = Query(query_id=name, prompt="", completion="", record=line, token_ids=token_ids, target_mask=mask)
    _checked_tokens(query, location)
    return query


def _whole_numbers(line: Mapping[str, object], field: str, location: str) -> tuple[int, ...]:
    value = line.get(field)
    if not isinstance(value, list) or not all(type(number) is int for number in value):
        found = "missing" if field not in line else abridged(value)
        raise CorpusError(f'{location}: field "{field}" is {found}; expected an array of whole numbers')
    return tuple(value)


def _text(line: Mapping[str, object], fields: Sequence[str], location: str, part: str) -> str:
    field = next((name for name in fields if name in line), None)
    if field is None:
        field_names = one_line(", ".join(list(line)[:12])) or "no fields"
        raise CorpusError(f"{location}: no {part}; expected a field {' or '.join(fields)}; found {field_names}")
    value = line[field]
    if not isinstance(value, str):
        raise CorpusError(f'{location}: field "{field}" is of type {type(value).__name__}; expected a string')
    return encodable(value, f'{location}: field "{field}"')


def _name(line: Mapping[str, object], fields: Sequence[str], location: str) -> str | None:
    field = next((name for name in fields if name in line), None)
    if field is None:
        return None
    value = line[field]
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise CorpusError(f'{location}: field "{field}" does not name the query; expected a string or a whole number')
    return encodable(str(value), f'{location}: field "{field}"')
