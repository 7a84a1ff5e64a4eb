"""Documentation that cannot drift: generated pages are up to date, commands exist as written, links lead somewhere."""

import re
import runpy
import shlex
from pathlib import Path

import click
import pytest

from trackstar.cli import trackstar as command_group

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md"), *ROOT.rglob("src/**/*.md")])
GENERATE = "run `make docs`"


def commands_of(page: Path) -> list[str]:
    """Lines of code blocks that begin with the command itself."""
    return re.findall(
        r"^ {4,}(?:\$ )?(?:\.venv/bin/)?(trackstar (?!COMMAND)[a-z]+ .*?)(?: *#.*)?$",
        page.read_text("utf-8"),
        re.MULTILINE,
    )


def test_command_line_page_is_up_to_date():
    generated = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    assert (ROOT / "docs" / "cli.md").read_text("utf-8") == generated["command_line_page"](), GENERATE
    assert (ROOT / "docs" / "explorer-api.json").read_text("utf-8") == generated["explorer_api"](), GENERATE


def test_file_tree_of_the_readme_is_up_to_date():
    generated = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    assert (ROOT / "README.md").read_text("utf-8") == generated["readme"](), GENERATE


def test_readme_shows_how_to_index_and_to_ask():
    assert {line.split()[1] for line in commands_of(ROOT / "README.md")} >= {"index", "query", "verify"}


@pytest.mark.parametrize("page", PAGES, ids=[page.relative_to(ROOT).as_posix() for page in PAGES])
def test_commands_as_written_have_the_options_that_exist(page: Path):
    for line in commands_of(page):
        words = shlex.split(line)[1:]
        command = command_group.commands[words[0]]
        with click.Context(command_group, info_name="trackstar") as parent:
            command.make_context(words[0], words[1:], parent=parent)  # raises where an option is not known


@pytest.mark.parametrize("page", PAGES, ids=[page.relative_to(ROOT).as_posix() for page in PAGES])
def test_links_lead_to_files_that_exist(page: Path):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text("utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target
