"""Write results as files: result lines, and beside them a report of the settings.

Result files are the JSON lines of the paper's public release, so that its viewer reads them. One
JSON report beside them holds what the release has no field for: λ and both spectra, damping,
coverage. It also holds the digest of the result lines, by which a later run recognizes them as
earlier results that it may replace.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trackstar.attribution.results import CARRIED_FIELDS, QueryReport
from trackstar.corpus import Query
from trackstar.corpus.digests import digest_of_bytes, digest_of_stream
from trackstar.errors import OptionError
from trackstar.store import is_url
from trackstar.store.files.outputs import (
    Input,
    check_can_write,
    check_replaceable,
    inputs,
    output_target,
    refuse_inputs,
    replace_bytes,
    replace_text,
)
from trackstar.text import abridged, one_line


def release_lines(report: QueryReport, *, query_set: str) -> list[str]:
    """Each result as one JSON line in the release's format.

    Raises:
        OptionError: A field cannot be written as JSON; see `check_queries_as_json`.
    """
    check_queries_as_json([result.query for result in report.results], query_set=query_set)
    return [json.dumps(result.to_release(query_set), ensure_ascii=False, allow_nan=False) for result in report.results]


def check_queries_as_json(queries: Sequence[Query], *, query_set: str = "") -> None:
    """Raise if results of queries could not be written as JSON lines, before long work.

    Raises:
        OptionError: A name, a text or a field that results repeat is not valid JSON: it holds NaN, an
            infinite number, half a surrogate pair or an object of another type. The message names
            the query and the field.
    """
    _check_json("`query_set`", query_set)
    for query in queries:
        carried = {field: query.record[field] for field in CARRIED_FIELDS if field in query.record}
        texts: dict[str, object] = {"query_id": query.query_id, "prompt": query.prompt, "completion": query.completion}
        texts |= {"alternative": list(query.alternatives), "groundtruth": query.truth}
        for field, value in {**carried, **texts}.items():
            _check_json(f'query {one_line(query.query_id)}: field "{field}"', value)


def _check_json(name: str, value: object) -> None:
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except UnicodeEncodeError:
        found = "half a surrogate pair, which is not text"
    except (ValueError, TypeError, RecursionError) as error:
        found = f"{abridged(value)} ({one_line(error)})"
    else:
        return
    raise OptionError(f"{name}: expected a value that JSON can hold, found {found}; change it, or leave it out")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ResultFiles:
    """The files of an answer.

    Attributes:
        lines: The result lines, under the name that the user gives.
        report: `STEM.report.json` beside them: the settings, and the digest of the result lines.
        audit: `STEM.audit.json` beside them.
        unfinished: `NAME.unfinished` beside them: partial results of a streamed corpus.
    """

    lines: Path
    report: Path
    audit: Path
    unfinished: Path

    @classmethod
    def at(cls, path: str | os.PathLike[str]) -> "ResultFiles":
        """The files for the path of the result lines.

        Raises:
            OptionError: The path is a URL.
        """
        _refuse_url(path)
        lines = Path(path)
        if not lines.name or lines.name == "..":
            raise OptionError(f"{path}: expected the name of a file for the results; choose one, such as results.jsonl")
        return cls(
            lines=lines,
            report=lines.with_name(f"{lines.stem}.report.json"),
            audit=lines.with_name(f"{lines.stem}.audit.json"),
            unfinished=lines.with_name(f"{lines.name}.unfinished"),
        )

    def check_replaceable(self, *, force: bool) -> None:
        """Raise if result lines or report are existing files that are no earlier results.

        Raises:
            OptionError: One of them is something else; the message names it.
        """
        check_replaceable(self.lines, self._is_lines, force=force)
        check_replaceable(self.report, self._is_report, force=force)

    def check_audit_replaceable(self, *, force: bool) -> None:
        """Raise if the audit is an existing file that is no audit of results under this name.

        Raises:
            OptionError: It is something else.
        """
        check_replaceable(self.audit, self._is_audit, force=force)

    def _is_report(self, file: Path) -> bool:
        found = _read_json(file)
        return {"mixing", "damping", "queries", "results"} <= set(found) and found["results"]["file"] == self.lines.name

    def _is_lines(self, file: Path) -> bool:
        report = output_target(self.report)
        # A run that was killed between its two files leaves the lines that its report replaces.
        entry = _read_json(report)["results"] if report.is_file() and self._is_report(report) else {}
        return digest_of_file(file) in (entry.get("digest"), entry.get("replaces"))

    def _is_audit(self, file: Path) -> bool:
        found = _read_json(file)
        return "audit_version" in found and found["results"]["file"] == self.lines.name


def check_writable(
    path: str | os.PathLike[str], *, read: Sequence[Input] = (), force: bool = False, streamed: bool = False
) -> None:
    """Raise if results cannot be written to a path, before long work. An existing file is left as
    it is.

    Args:
        path: File of the result lines.
        read: What the run reads, none of which may be replaced.
        force: Whether existing files that are no earlier results may be replaced.
        streamed: Whether partial results are saved as well.

    Raises:
        OptionError: The path is not writable, or a file would be replaced that may not be.
    """
    files = ResultFiles.at(path)
    written = [files.lines, files.report, files.audit, *([files.unfinished] if streamed else [])]
    refuse_inputs(written, read)
    files.check_replaceable(force=force)
    files.check_audit_replaceable(force=force)
    for file in written:
        check_can_write(file)


def write_results(
    report: QueryReport, path: str | os.PathLike[str], *, query_set: str = "queries", force: bool = False
) -> tuple[Path, Path]:
    """Write results as the release's JSON lines, and beside them a report of the settings.

    Each file appears whole or not at all. Earlier results under the same name are replaced; any other
    existing file is not, and nothing in the index or the model's folder.

    Args:
        report: A report of `answer_queries` or `stream_queries`.
        path: File of the result lines; the report is written beside it as `STEM.report.json`. A
            symbolic link is followed.
        query_set: The release's name for the set of queries.
        force: Whether to replace existing files that are no earlier results.

    Returns:
        The paths of the result lines and of the report.

    Raises:
        OptionError: The files cannot be written, an existing file is something else, or a query's
            field is not valid JSON.
    """
    files = ResultFiles.at(path)
    lines = "".join(f"{line}\n" for line in release_lines(report, query_set=query_set)).encode("utf-8")
    refuse_inputs([files.lines, files.report], inputs(index=report.index, model=report.model))
    files.check_replaceable(force=force)
    existing = output_target(files.lines)
    entry = {
        "file": files.lines.name,
        "digest": digest_of_bytes(lines, bits=256),
        "replaces": digest_of_file(existing) if existing.is_file() else None,
    }
    settings = json.dumps({**report.to_json(), "results": entry}, indent=1, ensure_ascii=False, allow_nan=False)
    replace_text(files.report, settings + "\n")
    replace_bytes(files.lines, lines)
    return files.lines, files.report


def digest_of_file(path: Path) -> str:
    """BLAKE2b-256 of a file's bytes."""
    with path.open("rb") as stream:
        return digest_of_stream(stream, bits=256)


def _read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    found = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise TypeError(type(found).__name__)
    return found


def _refuse_url(path: object) -> None:
    if is_url(path):
        raise OptionError(f"{path}: expected a file of this machine, found a URL; only indexes can be remote")
