"""What both demos share: the folder of a run, its files, stage times, and intervals in words."""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from trackstar.choices import DemoTask
from trackstar.errors import OptionError
from trackstar.evaluation.comparisons import Estimate
from trackstar.store.files.outputs import check_replaceable, replace_text
from trackstar.text import abridged, system_reason

SIDE = 32
"""Blocks of 32×32: 1,024 dimensions per layer block."""

_FIELDS: Mapping[DemoTask, frozenset[str]] = {
    "facts": frozenset({"id", "text", "topic", "role"}),
    "arithmetic": frozenset({"id", "text", "first", "second", "result", "carry"}),
}
"""Fields of a corpus record, by which a demo recognizes the other one's folder."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DemoFiles:
    """Files for further questions, and a prompt for them.

    Attributes:
        index: The float16 index of the whole corpus.
        queries: The demo's queries.
        results: Results of the queries that the demo explains.
        prompt: The prompt of the first query.
    """

    index: Path
    queries: Path
    results: Path
    prompt: str


class Stopwatch:
    """Wall time of each stage, in seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = time.monotonic()

    def lap(self, stage: str) -> None:
        """End a stage and begin the next one."""
        now = time.monotonic()
        self.seconds[stage] = round(now - self._start, 1)
        self._start = now


def check_folder(out: Path, task: DemoTask) -> None:
    """Raise if a folder holds something else than a run of this demo; it need not exist.

    Raises:
        OptionError: The folder holds other files or another demo, or cannot be listed.
    """
    try:
        names = sorted(entry.name for entry in out.iterdir() if not entry.name.startswith("."))
        other = _task_of(out / "corpus.jsonl") if "corpus.jsonl" in names else task
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise OptionError(f"`out`: {out} cannot be used ({system_reason(error)}); choose another folder") from None
    if names and "corpus.jsonl" not in names:
        raise OptionError(
            f"`out`: {out} holds {abridged(names[0])}, expected an empty folder or an earlier demo's; choose another "
            "folder"
        )
    if other not in (None, task):
        raise OptionError(
            f"`out`: {out} holds the demo of {other}, expected an empty folder or an earlier demo of {task}; choose "
            "another folder"
        )


def _task_of(corpus: Path) -> DemoTask | None:
    """The demo that wrote a corpus, by the fields of its first record; None if neither did."""
    if not corpus.is_file():
        return None
    with corpus.open(encoding="utf-8", errors="replace") as file:
        line = file.readline(10_000)
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    found = frozenset(record) if isinstance(record, dict) else frozenset()
    return next((task for task, fields in _FIELDS.items() if fields == found), None)


def write_inputs(
    out: Path, records: Sequence[Mapping[str, object]], queries: Sequence[Mapping[str, object]]
) -> tuple[Path, Path]:
    """Write the corpus and the queries as `corpus.jsonl` and `queries.jsonl`, if they do not exist yet.

    Raises:
        OptionError: A file of that name has other content, such as another seed's.
    """
    texts = {
        out / f"{name}.jsonl": "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
        for name, lines in (("corpus", records), ("queries", queries))
    }
    for path, text in texts.items():
        check_replaceable(path, _has(text))
    for path, text in texts.items():
        replace_text(path, text)
    return out / "corpus.jsonl", out / "queries.jsonl"


def is_report_of(kind: type) -> Callable[[Path], bool]:
    """Whether a file is the `report.json` of a report's dataclass."""
    expected = {field.name for field in dataclasses.fields(kind)}

    def is_report(file: Path) -> bool:
        found = json.loads(file.read_text(encoding="utf-8"))
        return isinstance(found, dict) and found.keys() == expected

    return is_report


def interval(value: Estimate, digits: int = 3) -> str:
    """A mean with its 95% interval, such as `0.703  (0.661-0.744)`."""
    return f"{value.mean:.{digits}f}  ({value.low:.{digits}f}-{value.high:.{digits}f})"


def signed_interval(value: Estimate, digits: int = 3) -> str:
    """A difference with its 95% interval, such as `+0.021 (-0.004 to +0.046)`."""
    return f"{value.mean:+z.{digits}f} ({value.low:+z.{digits}f} to {value.high:+z.{digits}f})"


def _has(text: str) -> Callable[[Path], bool]:
    return lambda file: file.read_text(encoding="utf-8") == text
