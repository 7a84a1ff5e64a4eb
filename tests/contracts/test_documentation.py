"""Documentation that cannot drift: generated pages are up to date, commands exist as written, links lead somewhere."""

import re
import runpy
import shlex
from pathlib import Path

import click
import pytest

from trackstar.cli import trackstar as command_group

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "src").rglob("*.md"),
    ]
)
GENERATE = "run `make docs`"


def commands_of(page: Path) -> list[str]:
    """Lines of indented code blocks that begin with the command."""
    return re.findall(
        r"^ {4,}(?:\$ )?(?:\.venv/bin/)?(trackstar (?!COMMAND)[a-z]+ .*?)(?: *#.*)?$",
        page.read_text("utf-8"),
        re.MULTILINE,
    )


def test_command_line_page_is_up_to_date():
    generated = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    assert (ROOT / "docs" / "cli.md").read_text("utf-8") == generated["command_line_page"](), GENERATE
    assert (ROOT / "docs" / "explorer-api.json").read_text("utf-8") == generated["explorer_api"](), GENERATE


def test_page_of_families_is_up_to_date():
    generated = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    assert (ROOT / "docs" / "families.md").read_text("utf-8") == generated["families_page"](), GENERATE


def test_tree_of_packages_is_up_to_date():
    generated = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    assert (ROOT / "CONTRIBUTING.md").read_text("utf-8") == generated["contributing"](), GENERATE


def test_tree_names_every_package_and_module():
    tree = runpy.run_path(str(ROOT / "docs" / "generate.py"))["package_tree"]()
    source = ROOT / "src" / "trackstar"
    packages = {f"{path.parent.name}/" for path in source.glob("*/__init__.py")}
    modules = {path.name for path in source.glob("*.py") if not path.name.startswith("__")}
    assert {line.split()[0] for line in tree.splitlines() if line.startswith("  ") and line[2] != " "} == (
        packages | modules
    )


def test_readme_shows_how_to_index_and_to_ask():
    assert {line.split()[1] for line in commands_of(ROOT / "README.md")} >= {"index", "query", "verify"}


@pytest.mark.parametrize("page", PAGES, ids=[page.relative_to(ROOT).as_posix() for page in PAGES])
def test_commands_as_written_have_the_options_that_exist(page: Path):
    for line in commands_of(page):
        words = shlex.split(line)[1:]
        command = command_group.commands[words[0]]
        with click.Context(command_group, info_name="trackstar") as parent:
            command.make_context(words[0], words[1:], parent=parent)  # raises if an option is unknown


@pytest.mark.parametrize("page", PAGES, ids=[page.relative_to(ROOT).as_posix() for page in PAGES])
def test_links_lead_to_files_that_exist(page: Path):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text("utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target
