"""Progress on stderr: a bar on a terminal, nothing elsewhere, and notes in both cases."""

import io
import sys

import pytest

from trackstar.progress import Progress


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")


def test_nothing_is_written_if_stderr_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
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
