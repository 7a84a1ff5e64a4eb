"""What a query's task asks for, and whether an answer to it is right: a record's fields `kind`,
`alternative` and `groundtruth`, and the names of its answer.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import cast

from trackstar.choices import KINDS, Kind
from trackstar.corpus.fields import encodable
from trackstar.corpus.matching import answer_is_correct
from trackstar.corpus.records import Query
from trackstar.errors import CorpusError
from trackstar.text import abridged, one_line

KIND, ALTERNATIVE, TRUTH = "kind", "alternative", "groundtruth"
ALIASES = "entity1_alias"
"""The release's field for the other names of an answer."""


def with_kind(query: Query, record: Mapping[str, object], location: str) -> Query:
    """The query with the kind, the alternatives and the right answer that its record states.

    A record with an alternative and no kind is a choice.

    Raises:
        CorpusError: The kind is unknown, a choice has no alternative, another kind has one, or a field
            holds something else than text; the message names location and field.
    """
    kind, alternatives = _kind(record, location), _alternatives(record, location)
    if alternatives and kind is None:
        kind = "choice"
    if kind == "choice" and not alternatives:
        raise CorpusError(
            f'{location}: kind "choice", and no field "{ALTERNATIVE}"; expected the completion that is compared with '
            "its own, or an array of several; add it"
        )
    if alternatives and kind != "choice":
        raise CorpusError(
            f'{location}: field "{ALTERNATIVE}" beside kind "{kind}"; expected it for a choice only; leave one of the '
            "two out"
        )
    truth = record.get(TRUTH)
    if truth is not None and not isinstance(truth, str):
        raise CorpusError(f'{location}: field "{TRUTH}" is {abridged(truth)}; expected the right answer as a string')
    if TRUTH not in record and query.completion.strip() in map(str.strip, alternatives):
        raise CorpusError(
            f'{location}: field "{ALTERNATIVE}" holds the completion itself; expected other completions; leave it out '
            "there"
        )
    if TRUTH in record and truth is None:
        truth = ""  # the right answer is unknown, as of results of a prompt alone
    elif truth is not None and truth.strip() in ("", query.completion.strip()):
        truth = None
    return dataclasses.replace(query, kind=kind, alternatives=alternatives, truth=truth)


def is_right(answer: str, query: Query, truth: str) -> bool:
    """Whether an answer to a query begins with the right one, or with one of its other names.

    Raises:
        CorpusError: The names are no names.
    """
    return answer_is_correct(answer, truth, aliases_of(query))


def aliases_of(query: Query) -> Sequence[str]:
    """The other names of a query's right answer, from its record.

    Raises:
        CorpusError: The field holds something else than strings.
    """
    aliases = query.record.get(ALIASES) or []
    names = [aliases] if isinstance(aliases, str) else aliases
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CorpusError(
            f'query {one_line(query.query_id)}: field "{ALIASES}" holds no names; expected an array of strings'
        )
    return names


def _kind(record: Mapping[str, object], location: str) -> Kind | None:
    found = record.get(KIND)
    if found is None:
        return None
    if found not in KINDS:
        raise CorpusError(
            f'{location}: field "{KIND}" is {abridged(found)}; expected one of {", ".join(KINDS)}; if it says '
            "something else, give it another name"
        )
    return cast("Kind", found)


def _alternatives(record: Mapping[str, object], location: str) -> tuple[str, ...]:
    found = record.get(ALTERNATIVE)
    values = [found] if isinstance(found, str) else found
    if values is None:
        return ()
    if not isinstance(values, (list, tuple)) or not all(isinstance(value, str) and value.strip() for value in values):
        raise CorpusError(
            f'{location}: field "{ALTERNATIVE}" is {abridged(found)}; expected a completion as text, or an array of '
            "several"
        )
    texts = [encodable(value, f'{location}: field "{ALTERNATIVE}"') for value in values]
    if len(set(texts)) < len(texts):
        raise CorpusError(f'{location}: field "{ALTERNATIVE}" holds a completion twice; expected each once')
    return tuple(texts)
