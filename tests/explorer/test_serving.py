"""`trackstar explore`: it stops with one line, and refuses wrong paths and ports with one."""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from release_file import write_release_file
from trackstar.errors import TrackstarError
from trackstar.explorer import server
from trackstar.explorer.server import IndexOptions, serve


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return write_release_file(tmp_path / "one.jsonl", queries=3)


@pytest.mark.parametrize(("stop", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_explorer_with_one_line(results: Path, stop: signal.Signals, status: int):
    """Also while a client is silent."""
    port = free_port()
    command = [sys.executable, "-m", "trackstar", "explore", str(results), "--no-browser", "--port", str(port)]
    # A shell's background jobs ignore Ctrl-C, and so would the explorer if the tests run in one.
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        try:
            until_it_listens(port)
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as client:
                client.request("GET", "/api/session")
                assert client.getresponse().status == 200
            with socket.create_connection(("127.0.0.1", port)) as silent:
                silent.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n")
                process.send_signal(stop)
                printed, said = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == status
    assert said.splitlines() == [f"explorer: http://127.0.0.1:{port}/ (Ctrl-C ends it)", "explorer: stopped"]
    assert printed == ""


def free_port() -> int:
    with server.listen(0) as listening:
        return listening.getsockname()[1]


def until_it_listens(port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.05)


def refused(*paths: str | os.PathLike[str], port: int = 0) -> str:
    with pytest.raises(TrackstarError) as error:
        serve([os.fspath(path) for path in paths], IndexOptions(), port=port, browser=False, note=print)
    message = str(error.value)
    assert message.isprintable()
    return message


@pytest.mark.parametrize("port", [-1, 65536, 70000, 10**30])
def test_a_port_out_of_range_is_refused(results: Path, port: int):
    assert f"expected 0 (any free port) to 65535, found {port}" in refused(results, port=port)


def test_a_port_in_use_is_refused(results: Path):
    with server.listen(0) as listening:
        port = listening.getsockname()[1]
        assert f"`port`: {port} cannot be used (Address already in use); choose another" in refused(results, port=port)


def test_a_port_without_the_right_to_it_is_refused(results: Path, monkeypatch: pytest.MonkeyPatch):
    def deny(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", deny)
    assert "`port`: 80 cannot be used (Permission denied); choose another port, or 0" in refused(results, port=80)


def test_one_file_under_two_names_is_refused(results: Path, tmp_path: Path):
    (tmp_path / "link.jsonl").symlink_to(results)
    for second in (results, tmp_path / "." / "one.jsonl", tmp_path / "link.jsonl"):
        assert refused(results, second).endswith(f"is the same as {results}; name each once")


def test_paths_that_are_no_results_and_no_index_are_refused(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "blank.jsonl").write_text("\n \n")
    (tmp_path / "text.txt").write_text("text\n")
    for name, message in {
        "empty": "", "pipe.jsonl": "a pipe", "pipe": "a pipe", "blank.jsonl": "holds no result",
        "text.txt": "not JSON lines", "none.jsonl": "no such file", "": "", "nul\0.jsonl": "",
    }.items():  # fmt: skip
        assert message in refused(str(tmp_path / name) if name else ""), name
    for device in ("/dev/null", "/dev/zero"):
        assert "a device" in refused(device)


def test_a_browser_that_waits_for_the_page_does_not_keep_it_waiting(results: Path, monkeypatch: pytest.MonkeyPatch):
    """A text browser runs in the terminal until it is left; it needs the server meanwhile."""
    seen: list[int] = []

    class StoppedError(Exception):
        pass

    def run(_server: object, sockets: list[socket.socket]) -> None:
        deadline = time.monotonic() + 10
        while not seen and time.monotonic() < deadline:
            with sockets[0].accept()[0] as connection:
                connection.recv(1000)
                connection.sendall(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
            time.sleep(0.05)
        raise StoppedError

    monkeypatch.setattr(server.uvicorn.Server, "run", run)
    monkeypatch.setattr(server.webbrowser, "open", lambda address: seen.append(httpx.get(address).status_code))
    with pytest.raises(StoppedError):
        serve([str(results)], IndexOptions(), note=lambda _line: None)
    assert seen == [204]
