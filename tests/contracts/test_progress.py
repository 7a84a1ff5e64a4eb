"""Progress on stderr: a bar on a terminal, a line every 30 seconds elsewhere, and notes in both cases."""

import io
import sys
from pathlib import Path

import pytest

from capitals import TEXTS
from trackstar.indexing.build import build_index
from trackstar.progress import Progress, observed
from trackstar.text import amount_of_bytes, duration


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class _Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class _Stages:
    """An observer that records each stage's title, total and units done."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, int | None]] = []
        self.done: list[int] = []

    def started(self, title: str, unit: str, total: int | None) -> None:
        self.stages.append((title, total))
        self.done.append(0)

    def advanced(self, amount: int) -> None:
        self.done[-1] += amount


@pytest.fixture(autouse=True)
def _plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")


def test_short_work_is_quiet_if_stderr_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with Progress("Indexing", unit="tokens", total=100) as progress:
        progress.advance(60)
    assert capfd.readouterr() == ("", "")


def test_bar_shows_title_share_and_rate_on_a_terminal() -> None:
    terminal = _Terminal()
    with Progress("Indexing {x} [/y]", unit="tokens", total=100, stream=terminal) as progress:
        for _ in range(4):
            progress.advance(25)
    shown = terminal.getvalue()
    assert "Indexing {x} [/y]" in shown
    assert "100%" in shown
    assert "tokens/s" in shown


def test_bar_without_a_total_shows_the_amount_done() -> None:
    terminal = _Terminal()
    with Progress("Reading", unit="records", stream=terminal) as progress:
        progress.advance(1234)
        progress.advance(1)
    assert "1,235 records" in terminal.getvalue()
    assert "%" not in terminal.getvalue()


def test_notes_are_plain_lines_with_and_without_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    note = "3 records [red]skipped[/red] :smile: " + "x" * 150
    with Progress("Indexing", unit="tokens") as progress:
        progress.note(note)
    assert capfd.readouterr() == ("", note + "\n")
    terminal = _Terminal()
    with Progress("Indexing", unit="tokens", stream=terminal) as progress:
        progress.note(note)
    assert note + "\n" in terminal.getvalue()


def test_notes_cannot_control_the_terminal() -> None:
    for stream in (_Terminal(), io.StringIO()):
        with Progress("Indexing", unit="tokens", stream=stream) as progress:
            progress.note("record \x1b]0;owned\x07 of\nfile\x9b2J")
        assert "record  ]0;owned  of file 2J\n" in stream.getvalue()


def test_bar_ends_when_work_fails() -> None:
    terminal = _Terminal()

    def failing_work() -> None:
        with Progress("Indexing", unit="tokens", stream=terminal) as progress:
            progress.advance(1)
            raise KeyError

    with pytest.raises(KeyError):
        failing_work()
    assert terminal.getvalue().endswith("\x1b[?25h"), "the cursor is shown again"


def test_the_stream_is_the_current_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    Progress("Indexing", unit="tokens").note("a note")
    assert stream.getvalue() == "a note\n"


def test_a_line_every_thirty_seconds_without_a_terminal():
    stream, clock = io.StringIO(), _Clock()
    with Progress("Indexing", unit="examples", total=2000, stream=stream, clock=clock) as progress:
        for seconds, amount in ((29.9, 100), (0.2, 200), (29.0, 300), (2.0, 600)):
            clock.now += seconds
            progress.advance(amount)
        clock.now += 38.9
    assert stream.getvalue().splitlines() == [
        "Indexing: 300 of 2,000 examples (15%), 10 examples/s, 2 min 51 s left",
        "Indexing: 1,200 of 2,000 examples (60%), 20 examples/s, 41 s left",
        "Indexing: 1,200 examples, done in 1 min 40 s",
    ]


def test_a_line_without_a_total_shows_the_amount_and_the_rate():
    stream, clock = io.StringIO(), _Clock()
    with Progress("Streaming", unit="examples", stream=stream, clock=clock) as progress:
        clock.now += 40
        progress.advance(2)
    assert stream.getvalue().splitlines()[0] == "Streaming: 2 examples, 0.05 examples/s"


def test_the_rate_leaves_out_what_an_earlier_run_has_done():
    stream, clock = io.StringIO(), _Clock()
    with Progress("Indexing", unit="examples", total=10_000, stream=stream, clock=clock) as progress:
        progress.resume(9000)
        clock.now += 30
        progress.advance(300)
    assert stream.getvalue().splitlines()[0] == (
        "Indexing: 9,300 of 10,000 examples (93%), 10 examples/s, 1 min 10 s left"
    )


def test_the_clock_of_a_stage_begins_with_its_context():
    stream, clock = io.StringIO(), _Clock()
    progress = Progress("Indexing", unit="examples", total=100, stream=stream, clock=clock)
    clock.now += 500
    with progress:
        progress.advance(1)
        clock.now += 31
        progress.advance(30)
    assert stream.getvalue().splitlines()[0] == "Indexing: 31 of 100 examples (31%), 1 examples/s, 1 min 9 s left"


def test_failed_work_is_not_said_to_be_done():
    stream, clock = io.StringIO(), _Clock()

    def failing_work() -> None:
        with Progress("Indexing", unit="examples", total=10, stream=stream, clock=clock) as progress:
            clock.now += 30
            progress.advance(5)
            raise KeyError

    with pytest.raises(KeyError):
        failing_work()
    assert len(stream.getvalue().splitlines()) == 1


@pytest.mark.parametrize("terminal", [False, True])
def test_hidden_progress_shows_neither_a_bar_nor_lines(terminal: bool):
    stream, clock = (_Terminal() if terminal else io.StringIO()), _Clock()
    with Progress("Indexing", unit="examples", total=10, stream=stream, shown=False, clock=clock) as progress:
        clock.now += 60
        progress.advance(5)
    assert stream.getvalue() == ""


def test_a_bar_that_resumes_begins_with_what_is_done():
    terminal = _Terminal()
    with Progress("Indexing", unit="tokens", total=100, stream=terminal) as progress:
        progress.resume(60)
        progress.advance(40)
    assert "100%" in terminal.getvalue()


def test_every_stage_of_an_index_shows_its_progress(tiny_model_folder: Path, tmp_path: Path):
    stages = _Stages()
    with observed(stages):
        build_index(
            str(tiny_model_folder), TEXTS, tmp_path / "index", layer_blocks=2, side=8, second_moment="estimate",
            second_moment_examples=10, whitening_examples=12, codec="1-bit", progress=False,
        )  # fmt: skip
    assert stages.stages == [
        ("Reading the corpus", None),
        ("Drawing a sample", 24),
        ("Estimating V", 10),
        ("Drawing a sample", 24),
        ("First pass", 12),
        ("Whitening", 4),
        ("Indexing", 24),
    ]
    counted = dict(zip([title for title, _ in stages.stages], stages.done, strict=True))
    assert [counted[title] for title in ("Estimating V", "First pass", "Whitening", "Indexing")] == [10, 12, 4, 24]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.04, "0.0 s"), (9.4, "9.4 s"), (9.6, "10 s"), (59.4, "59 s"), (59.6, "1 min"), (200, "3 min 20 s"),
        (3600, "1 h"), (7500, "2 h 5 min"), (86_400, "1 day"), (3 * 86_400 + 4 * 3600 + 59, "3 days 4 h"),
    ],
)  # fmt: skip
def test_durations_are_given_in_words(seconds: float, words: str):
    assert duration(float(seconds)) == words


def test_bytes_are_given_in_words():
    shown = [amount_of_bytes(float(n)) for n in (100, 8300, 3 * 2**20, 3.9 * 2**30, 2**41)]
    assert shown == ["0.1 KiB", "8.1 KiB", "3.0 MiB", "3.9 GiB", "2.0 TiB"]
