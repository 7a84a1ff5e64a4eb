"""Questions of published tasks, in the forms in which their authors publish them, as records with a prompt, a
completion and the task's kind.

| task | form | its record |
|---|---|---|
| COPA | XML, JSON lines (SuperGLUE) | a choice: the premise and "because" or "so", two endings |
| PIQA | JSON lines, labels in `NAME-labels.lst` beside `NAME.jsonl` | a choice: the goal, two solutions |
| word problems | JSON lines (GSM8K), JSON (SVAMP, MAWPS, Roy and Roth), XML (ASDiv) | a generation: the \
problem and "Answer:", the number |

How the paper's authors wrote these prompts (Appendix A.5) is not published; the wording here is ours.
"""

import os
import re
import xml.parsers.expat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trackstar.corpus.data_files import LONGEST_LINE
from trackstar.corpus.fields import encodable
from trackstar.corpus.kinds import ALTERNATIVE, KIND
from trackstar.corpus.local_files import check_not_special
from trackstar.corpus.record_reader import Record
from trackstar.errors import CorpusError
from trackstar.text import abridged, one_line, system_reason

_PROMPTS = frozenset({"prompt", "inputs_plaintext"})
"""Fields of a record that is a query already."""
_CONNECTIVES = {"cause": "because", "effect": "so"}
_LOWERED = frozenset(
    "A All An Another As At Both Each Every Few For He Her His In It Its Many Most My No Nobody Of On One Our She Some "
    "Somebody Someone That The Their There These They This Those Two We What When You Your".split()
)
"""Words that have a capital letter only because they begin a sentence."""
_NUMBER = re.compile(r"[-+]?[\d,]*\.?\d+")
_GSM8K = "####"
_CHUNK_BYTES = 1 << 16
_RECORDS = ("item", "Problem")
"""XML elements that hold a question: COPA's and ASDiv's."""


class TaskQuestions:
    """Recognizes the questions of published tasks, record by record."""

    def __init__(self) -> None:
        self._labels: dict[Path, Sequence[str]] = {}
        self._records: dict[Path, int] = {}  # so far, by the file of their labels

    def query_fields(self, record: Mapping[str, object], location: str, stem: str) -> Mapping[str, object]:
        """The fields of a question as a query's, with its own; a record of any other form as it is.

        Args:
            record: The fields.
            location: Their location, `FILE:LINE`.
            stem: Name of the file without its endings.

        Raises:
            CorpusError: The question has no label, or a part of it is of the wrong form; the message
                names the location.
        """
        if not _PROMPTS.isdisjoint(record):
            return record
        if {"premise", "choice1"} <= record.keys() or {"p", "asks-for"} <= record.keys():
            return {**record, **_copa(record, location)}
        if {"goal", "sol1"} <= record.keys():
            label = record["label"] if "label" in record else self._label(location, stem)
            return {**record, **_piqa(record, label, location)}
        problem = _word_problem(record, location)
        return record if problem is None else {**record, **problem}

    def _label(self, location: str, stem: str) -> str:
        """PIQA's label of the next record of a file, from the file of labels beside it."""
        path = Path(location).with_name(f"{stem}-labels.lst")
        if path not in self._labels:
            try:
                check_not_special(path)
                self._labels[path] = path.read_text(encoding="utf-8").split()
            except (OSError, ValueError) as error:
                reason = system_reason(error) if isinstance(error, OSError) else one_line(error)
                raise CorpusError(
                    f'{location}: no field "label", and {path} cannot be read ({reason}); put the labels there, as '
                    "PIQA's authors do"
                ) from None
        labels, number = self._labels[path], self._records.get(path, 0)
        self._records[path] = number + 1
        if number >= len(labels):
            raise CorpusError(
                f"{path}: holds labels of {len(labels):,} questions, and {location} is number {number + 1:,}; expected "
                "one label per question; complete the file"
            )
        return labels[number]

    def check_all_used(self) -> None:
        """Raise if a file of labels has more labels than its questions, so that they may not belong together.

        Raises:
            CorpusError: It has more; the message names it.
        """
        for path, labels in self._labels.items():
            if self._records[path] < len(labels):
                raise CorpusError(
                    f"{path}: holds labels of {len(labels):,} questions, found {self._records[path]:,} beside it; "
                    "expected one label per question; take both files from their source"
                )


def _copa(record: Mapping[str, object], location: str) -> dict[str, object]:
    is_xml = "asks-for" in record
    asks = record.get("asks-for" if is_xml else "question")
    if not isinstance(asks, str) or asks not in _CONNECTIVES:
        field = "asks-for" if is_xml else "question"
        raise CorpusError(f'{location}: field "{field}" is {abridged(asks)}; expected cause or effect')
    premise, *choices = (
        _text(record, field, location) for field in (("p", "a1", "a2") if is_xml else ("premise", "choice1", "choice2"))
    )
    field = "most-plausible-alternative" if is_xml else "label"
    right = _right(record.get(field), field, location, first=1 if is_xml else 0)
    endings = [_within_sentence(choice) for choice in choices]
    prompt = f"{premise.rstrip(' .')} {_CONNECTIVES[asks]}"
    return {
        **_name("copa", record, ("id", "idx")), KIND: "choice", "task": "COPA", "prompt": prompt,
        "completion": endings[right], ALTERNATIVE: endings[1 - right],
    }  # fmt: skip


def _piqa(record: Mapping[str, object], label: object, location: str) -> dict[str, object]:
    goal, *solutions = (_text(record, field, location) for field in ("goal", "sol1", "sol2"))
    right = _right(label, "label", location)
    return {
        **_name("piqa", record, ("id",)), KIND: "choice", "task": "PIQA", "prompt": goal,
        "completion": solutions[right], ALTERNATIVE: solutions[1 - right],
    }  # fmt: skip


def _word_problem(record: Mapping[str, object], location: str) -> dict[str, object] | None:
    if {"Body", "Question", "Answer"} <= record.keys():  # SVAMP, ASDiv
        body, question = (
            _text(record, field, location, may_be_empty=field == "Body") for field in ("Body", "Question")
        )
        body = body if not body or body[-1] in ".!?,:;\"'”’" else f"{body}."
        problem, answer = f"{body} {question}".strip(), _number(record["Answer"], "Answer", location)
    elif {"sQuestion", "lSolutions"} <= record.keys():  # MAWPS, Roy & Roth
        solutions = record["lSolutions"]
        if not isinstance(solutions, (list, tuple)) or len(solutions) != 1:
            raise CorpusError(
                f'{location}: field "lSolutions" is {abridged(solutions)}; expected an array of one number'
            )
        problem, answer = _text(record, "sQuestion", location), _number(solutions[0], "lSolutions", location)
    elif isinstance(record.get("answer"), str) and _GSM8K in str(record["answer"]) and "question" in record:
        problem = _text(record, "question", location)
        answer = str(record["answer"]).rpartition(_GSM8K)[2].strip()
    else:
        return None
    if not answer:
        raise CorpusError(f"{location}: the answer is empty; expected a number")
    return {
        **_name("problem", record, ("ID", "iIndex")), KIND: "generation", "task": "word problems",
        "prompt": f"{problem}\nAnswer:", "completion": answer,
    }  # fmt: skip


def _name(task: str, record: Mapping[str, object], fields: Sequence[str]) -> dict[str, object]:
    """The question's name, such as `copa:17`, if it has an id; else it is named after its file."""
    if "query_id" in record:
        return {}
    found = next((record[field] for field in fields if isinstance(record.get(field), (str, int))), None)
    return {} if found is None else {"query_id": f"{task}:{found}"}


def _right(label: object, field: str, location: str, *, first: int = 0) -> int:
    """Which of two answers is right: 0 or 1."""
    choices = (first, first + 1)
    if isinstance(label, bool) or str(label).strip() not in map(str, choices):
        found = "missing" if label is None else abridged(label)
        raise CorpusError(
            f'{location}: field "{field}" is {found}; expected {choices[0]} or {choices[1]}, the right answer; '
            "questions without one, as of a test set, cannot be asked"
        )
    return int(str(label)) - first


def _text(record: Mapping[str, object], field: str, location: str, *, may_be_empty: bool = False) -> str:
    value = record.get(field)
    if not isinstance(value, str) or not (value.strip() or may_be_empty):
        found = abridged(value) if field in record else "missing"
        raise CorpusError(f'{location}: field "{field}" is {found}; expected a text')
    return " ".join(encodable(value, f'{location}: field "{field}"').split())


def _number(value: object, field: str, location: str) -> str:
    """An answer as a number is written: `9` for 9.0 and for `9 (apples)`."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(int(value)) if float(value).is_integer() else repr(value)
    text = value.partition("(")[0].strip() if isinstance(value, str) else ""
    if not text:
        raise CorpusError(f'{location}: field "{field}" is {abridged(value)}; expected a number')
    return str(int(float(text))) if _NUMBER.fullmatch(text) and re.fullmatch(r"-?\d+\.0+", text) else text


def _within_sentence(choice: str) -> str:
    """A sentence as the second part of another."""
    first, space, rest = choice.partition(" ")
    return f"{first.lower() if first in _LOWERED else first}{space}{rest}"


def is_xml(path: object) -> bool:
    """Whether a path names an XML file."""
    return isinstance(path, (str, os.PathLike)) and os.fsdecode(os.fspath(path)).lower().endswith(".xml")


def xml_records(path: str | os.PathLike[str]) -> Iterator[Record]:
    """The questions of an XML file of COPA or ASDiv: the attributes and the parts of each.

    Entities of the file's own are refused; no other file is read.

    Raises:
        CorpusError: The file cannot be read, or is broken; the message names file and line.
    """
    name = os.fsdecode(os.fspath(path))
    file = Path(name)
    check_not_special(file)
    reader = _XmlReader(name)
    number = 0
    try:
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                reader.feed(chunk)
                for line, fields in reader.take():
                    yield Record(number=number, stem=file.stem, value=fields, location=f"{name}:{line}")
                    number += 1
        reader.feed(b"", last=True)
    except OSError as error:
        raise CorpusError(f"{name}: cannot be read ({system_reason(error)}); check the path") from None
    except xml.parsers.expat.ExpatError as error:
        reason = xml.parsers.expat.ErrorString(error.code)
        raise CorpusError(
            f"{name}:{error.lineno}: broken XML ({reason}); expected a file as its authors publish it"
        ) from None
    if not number:
        raise CorpusError(f"{name}: holds no question; expected elements {' or '.join(_RECORDS)}, as of COPA or ASDiv")


class _XmlReader:
    """Questions as the parser comes to their ends."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._found: list[tuple[int, dict[str, object]]] = []
        self._fields: dict[str, Any] | None = None
        self._part: str | None = None
        self._line = 0
        self._characters = 0
        self._parser = parser = xml.parsers.expat.ParserCreate()
        parser.buffer_text = True
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self._text
        parser.EntityDeclHandler = self._refuse

    def feed(self, chunk: bytes, *, last: bool = False) -> None:
        """Parse further bytes."""
        self._parser.Parse(chunk, last)

    def take(self) -> list[tuple[int, dict[str, object]]]:
        """The questions that ended since the last call, each with its line."""
        found, self._found = self._found, []
        return found

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        if self._fields is None and name in _RECORDS:
            self._fields, self._line, self._characters = dict(attributes), self._parser.CurrentLineNumber, 0
        elif self._fields is not None and self._part is None:
            if name in self._fields:
                raise CorpusError(f"{self._where()}: {one_line(name, 60)} is repeated; expected each part once")
            self._part = name
            self._fields[name] = ""

    def _end(self, name: str) -> None:
        if self._fields is not None and name in _RECORDS and self._part is None:
            self._found.append((self._line, self._fields))
            self._fields = None
        elif name == self._part:
            self._part = None

    def _text(self, text: str) -> None:
        if self._fields is not None and self._part is not None:
            self._characters += len(text)
            if self._characters > LONGEST_LINE:
                raise CorpusError(f"{self._where()}: a question of more than {LONGEST_LINE:,} characters; shorten it")
            self._fields[self._part] += text

    def _refuse(self, name: str, *_: object) -> None:
        raise CorpusError(
            f"{self._where()}: declares the entity {one_line(name, 60)}; expected plain text; write that in its place"
        )

    def _where(self) -> str:
        return f"{self._name}:{self._parser.CurrentLineNumber}"
