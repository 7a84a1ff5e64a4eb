"""Read queries from files: a prompt and its completion, a conversation, an instruction, or tokens."""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from trackstar.choices import JOINS, Join
from trackstar.corpus.chat import conversation, read_template
from trackstar.corpus.fields import check_writable, encodable
from trackstar.corpus.kinds import KIND, with_kind
from trackstar.corpus.origins import source_of
from trackstar.corpus.queries import checked_tokens
from trackstar.corpus.reading import CONVERSATION_FIELDS, MASK_FIELDS, TOKENS_FIELD
from trackstar.corpus.record_reader import (
    NO_TARGET,
    Record,
    instruction_messages,
    instruction_prompt,
    target_positions,
    whole_conversation,
    whole_numbers,
)
from trackstar.corpus.records import Query
from trackstar.corpus.sources import ALL
from trackstar.corpus.task_files import TaskQuestions, is_xml, xml_records
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


def read_queries(
    path: str | os.PathLike[str],
    *,
    prompt_field: str | None = None,
    needs_completion: bool = True,
    join: Join = "auto",
    chat_template: str | os.PathLike[str] | None = None,
) -> list[Query]:
    """Read queries from any file, folder, glob or dataset that records of a corpus are read from, but
    for plain text.

    A record is one of these. Its name is the first of `ID_FIELDS` that it has, else `STEM:NUMBER`,
    counted from 0.

    * A prompt and a completion: `prompt` and `completion`, or as in the public release's facts
      (`prompt0`, `prompt1`, `prompt2`; `entity1`), or as in its results (`inputs_plaintext`;
      `targets_plaintext`). The field `separator` of earlier results, a space or nothing, takes the
      place of `join`.
    * A conversation, as `messages` or `conversations`, or with the messages divided between
      `prompt` and `completion`. Its last answer is the completion.
    * `instruction`, with `input` or without, and `output`, as Alpaca's prompt and completion, or as a
      conversation if there is a `chat_template`.
    * `input_ids`, with `labels` (the targets' token ids, and -100 elsewhere) or `loss_mask`.
    * A question of COPA, PIQA or a set of arithmetic word problems, as its authors publish it; see
      `task_files.py`. Their XML files are read, too.

    A record may say the `kind` of its task: `fact`, `choice` (with `alternative`: another completion,
    or several), `generation` or `open`; and `groundtruth`, if its completion is not the right answer.

    Args:
        path: File, folder, glob or URL.
        prompt_field: Field that holds the prompt; None is the first of `PROMPT_FIELDS` that a
            record has.
        needs_completion: Whether to refuse a record without a completion. If not, its completion
            is empty and must be filled in, for example with the model's output; the last answer of
            a conversation is left out.
        join: How prompts and completions are joined; see `joined`.
        chat_template: File with the template of conversations; None is the tokenizer's own.

    Raises:
        OptionError: `join` is unknown, or the template cannot be read.
        CorpusError: A record is not a query, two have the same name, a field holds something that
            results cannot repeat (NaN, half a surrogate pair), or there is no query; the message
            names file and line.
    """
    check_choice("join", join, JOINS)
    template = None if chat_template is None else read_template(chat_template)
    name, records = query_records(path)
    queries: list[Query] = []
    locations: dict[str, str] = {}
    for record in records:
        fields = record.value
        query = query_of_record(
            fields, record.location, name=f"{record.stem}:{len(queries)}", prompt_field=prompt_field,
            needs_completion=needs_completion, join=join, as_chat=template is not None,
        )  # fmt: skip
        if query.messages is not None:
            query = dataclasses.replace(query, chat_template=template)
        if query.query_id in locations:
            first = locations[query.query_id]
            raise CorpusError(
                f'{record.location}: query "{one_line(query.query_id)}" is also at {first}; name each once'
            )
        locations[query.query_id] = record.location
        queries.append(query)
    if not queries:
        raise CorpusError(f"{name}: holds no query; expected at least one line that is not blank")
    return queries


def query_records(path: str | os.PathLike[str]) -> tuple[str, Iterator[Record]]:
    """The name of a file of queries and its records; a published task's question has a query's fields, too.

    Raises:
        CorpusError: The file cannot be read, or a record is plain text or cannot be written as JSON.
    """
    if is_xml(path):
        return os.fsdecode(os.fspath(path)), _as_queries(xml_records(path), path)
    source = source_of(path)
    return source.name, _as_queries(source.records(0, ALL), path)


def _as_queries(records: Iterator[Record], path: str | os.PathLike[str]) -> Iterator[Record]:
    questions = TaskQuestions()
    for record in records:
        if not isinstance(record.value, Mapping):
            raise CorpusError(f"{path}: plain text; queries are records with a prompt; write JSON lines")
        fields = cast("Mapping[str, object]", record.value)
        check_writable(fields, record.location)
        yield record._replace(value=questions.query_fields(fields, record.location, record.stem))
    questions.check_all_used()


def in_template(queries: Sequence[Query], template: str | None, *, instructions: bool) -> list[Query]:
    """The queries, of which conversations without a chat template get that text as theirs.

    An index keeps the template of its conversations, so that questions need not name it again.

    Args:
        queries: The queries.
        template: The template's text; None is the tokenizer's own.
        instructions: Whether the index's instructions were rendered as conversations; those of the
            queries then are, too.
    """
    rendered = []
    for query in queries:
        asked = query
        of_texts = query.messages is None and query.token_ids is None
        if instructions and of_texts and _is_instruction(query.record):
            location = f"query {one_line(query.query_id)}"
            messages = instruction_messages(query.record, location)
            asked = _query_of_messages(
                query.record, "messages", messages, location, query.query_id, needs_completion=bool(query.completion)
            )
            asked = with_kind(asked, query.record, location)
        if asked.messages is not None and asked.chat_template is None:
            asked = dataclasses.replace(asked, chat_template=template)
        rendered.append(asked)
    return rendered


def _is_instruction(record: Mapping[str, object]) -> bool:
    return "instruction" in record and not any(field in record for field in PROMPT_FIELDS)


def query_of_record(
    record: Mapping[str, object],
    location: str,
    *,
    name: str,
    prompt_field: str | None = None,
    needs_completion: bool = True,
    join: Join = "auto",
    as_chat: bool = False,
) -> Query:
    """The query of a record, with its kind; see `read_queries`.

    Args:
        record: Its fields.
        location: Its location, for messages.
        name: The query's name if the record has none.
        prompt_field: See `read_queries`.
        needs_completion: See `read_queries`.
        join: See `read_queries`.
        as_chat: Whether an instruction becomes a conversation.

    Raises:
        CorpusError: It is no query; the message names the location.
    """
    query = _asked(
        record, location, name=name, prompt_field=prompt_field, needs_completion=needs_completion, join=join,
        as_chat=as_chat,
    )  # fmt: skip
    return with_kind(query, record, location)


def _asked(
    record: Mapping[str, object],
    location: str,
    *,
    name: str,
    prompt_field: str | None,
    needs_completion: bool,
    join: Join,
    as_chat: bool,
) -> Query:
    prompt_fields = PROMPT_FIELDS if prompt_field is None else (prompt_field,)
    if prompt_field is None and PROMPT_FIELDS[-1] in record:
        prompt_fields = PROMPT_FIELDS[-1:]  # a line of results may carry its fact's prompts, too
    prompt_name = next((field for field in prompt_fields if field in record), None)
    is_result = prompt_name == PROMPT_FIELDS[-1]  # of the release, or of trackstar
    # A line of results carries its fact's fields, too, such as entity1: its own come first.
    completion_fields = COMPLETION_FIELDS[::-1] if is_result else COMPLETION_FIELDS
    name = _name(record, RESULT_ID_FIELDS if is_result else ID_FIELDS, location) or name
    join = _join(record, location) or join
    has_completion = any(field in record for field in completion_fields)
    if TOKENS_FIELD in record and needs_completion:
        query = _query_of_tokens(record, location, name)
        if prompt_name is None or not has_completion:
            return query
        prompt = _text(record, prompt_fields, location, "prompt")
        completion = _text(record, completion_fields, location, "completion")
        return dataclasses.replace(query, prompt=prompt, completion=completion)
    messages = _messages(record, prompt_name)
    if as_chat and prompt_field is None and _is_instruction(record):
        messages = ("messages", instruction_messages(record, location))
    if messages is not None:
        field, value = messages
        return _query_of_messages(record, field, value, location, name, needs_completion=needs_completion)
    if prompt_name is None and prompt_field is None and "instruction" in record:
        prompt, completion_fields = instruction_prompt(record, location), ("output",)
        has_completion = "output" in record
    else:
        prompt = _text(record, prompt_fields, location, "prompt")
    if not needs_completion and not has_completion:
        return Query(query_id=name, prompt=prompt, record=record, join=join)
    if not has_completion and record.get(KIND) in ("open", "generation"):
        raise CorpusError(f"{location}: no completion; expected one; add it, or let the model answer with `generate`")
    completion = _text(record, completion_fields, location, "completion")
    if needs_completion and not completion.strip():
        raise CorpusError(
            f"{location}: the completion is empty; expected the text whose probability is to be explained"
        )
    return Query(query_id=name, prompt=prompt, completion=completion, record=record, join=join)


def _messages(record: Mapping[str, object], prompt_name: str | None) -> tuple[str, object] | None:
    """The field and value of a record's conversation; None if the record is none."""
    if prompt_name is None:
        field = next((field for field in CONVERSATION_FIELDS if field in record), None)
        return None if field is None else (field, record[field])
    prompt = record[prompt_name]
    if not isinstance(prompt, (list, tuple)):
        return None
    return prompt_name, whole_conversation(prompt, record.get("completion", ()))


def _query_of_messages(
    record: Mapping[str, object], field: str, messages: object, location: str, name: str, *, needs_completion: bool
) -> Query:
    chat = conversation(messages, record.get("tools"), field, location, system=record.get("system"))
    if needs_completion and not chat.answers:
        raise CorpusError(
            f"{location}: the conversation has no message of the assistant; expected one, whose probability is to be "
            "explained; add it"
        )
    kept: tuple[Mapping[str, Any], ...] = chat.messages
    answer = ""  # what a generated one is compared with
    if needs_completion:
        kept = kept[: chat.answers[-1] + 1]
    elif kept[-1]["role"] == "assistant":
        kept, answer = kept[:-1], str(kept[-1].get("content", ""))
    if not kept:
        raise CorpusError(f"{location}: the conversation has no message before its answer; expected one; add it")
    return Query(query_id=name, completion=answer, record=record, messages=kept, tools=chat.tools)


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


def _query_of_tokens(record: Mapping[str, object], location: str, name: str) -> Query:
    if all(record.get(field) is None for field in ("labels", *MASK_FIELDS)):
        raise CorpusError(
            f"{location}: no labels; expected as many as {TOKENS_FIELD}, each the token or, for a token that is no "
            f"target, {NO_TARGET}"
        )
    token_ids = whole_numbers(record[TOKENS_FIELD], TOKENS_FIELD, location)
    mask = target_positions(record, token_ids, TOKENS_FIELD, location)
    query = Query(query_id=name, record=record, token_ids=tuple(token_ids.tolist()), target_mask=tuple(mask.tolist()))
    checked_tokens(query, location)
    return query


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
