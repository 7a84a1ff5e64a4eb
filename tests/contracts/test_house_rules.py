"""Rules of the house that no linter checks: size of packages and functions, width of prose, flags in messages."""

import ast
import re
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import trackstar

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "trackstar"
MODULES = sorted(SOURCE.rglob("*.py"))
GENERATED = {ROOT / "docs" / "cli.md"}
PAGES = [
    path
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
    if path not in GENERATED
]

MOST_MODULES = 6
MOST_LAYERS = 15
MOST_CODE_LINES = 60
MOST_PARAMETERS = 10
MOST_README_LINES = 130
MOST_COLUMNS = 110

FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]+")

Function = ast.FunctionDef | ast.AsyncFunctionDef


# ---- The checks, each from source text to what breaks the rule -----------------------------------------------------


def flags_in_strings(source: str) -> list[str]:
    """Lines with a command-line flag in a string, a part of an f-string or a docstring."""
    return [
        f"{node.lineno}: {flag}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for flag in FLAG.findall(node.value)
    ]


def code_lines(source: str, function: Function) -> int:
    """Lines of a function without its docstring, comments and blank lines."""
    lines = source.splitlines()
    first = function.body[0]
    docstring = range(0)
    if ast.get_docstring(function, clean=False) is not None:
        docstring = range(first.lineno, (first.end_lineno or first.lineno) + 1)
    return sum(
        number not in docstring and bool(lines[number - 1].strip()) and not lines[number - 1].lstrip().startswith("#")
        for number in range(function.lineno, (function.end_lineno or function.lineno) + 1)
    )


def long_functions(source: str) -> list[str]:
    """Functions with more lines of code than are allowed."""
    return [
        f"{node.name}: {count} lines"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, Function) and (count := code_lines(source, node)) > MOST_CODE_LINES
    ]


def wide_functions(source: str, public: set[str]) -> list[str]:
    """Functions with more parameters than are allowed, except public ones and click commands."""
    tree = ast.parse(source)
    excepted: set[Function] = set()
    for node in tree.body:
        if isinstance(node, Function) and node.name in public:
            excepted.add(node)
        elif isinstance(node, ast.ClassDef) and node.name in public:
            excepted.update(member for member in node.body if isinstance(member, Function))
    return [
        f"{node.name}: {count} parameters"
        for node in ast.walk(tree)
        if isinstance(node, Function)
        and node not in excepted
        and not any("click.command" in ast.unparse(decorator) for decorator in node.decorator_list)
        and (count := parameters(node)) > MOST_PARAMETERS
    ]


def parameters(function: Function) -> int:
    """Number of parameters, without self and cls."""
    given = function.args
    names = [argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def wide_prose(page: str) -> list[str]:
    """Lines of prose of a Markdown page that are too wide; code, tables and links may be wider."""
    wide = []
    fenced = False
    for number, line in enumerate(page.splitlines(), start=1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        prose = not (fenced or line.startswith(("    ", "|")) or re.match(r"\s*(?:[*-] )?!?\[.*\]\(.*\)\S*$", line))
        if prose and len(line) > MOST_COLUMNS:
            wide.append(f"{number}: {len(line)} columns")
    return wide


def wide_comments(source: str) -> list[str]:
    """Lines of docstrings and comments that are too wide."""
    rows: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else []:
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                rows.update(range(statement.lineno, (statement.end_lineno or statement.lineno) + 1))
    lines = source.splitlines()
    for token in tokenize.generate_tokens(iter(source.splitlines(keepends=True)).__next__):
        if token.type == tokenize.COMMENT and lines[token.start[0] - 1].lstrip().startswith("#"):
            rows.add(token.start[0])
    return [f"{row}: {len(lines[row - 1])} columns" for row in sorted(rows) if len(lines[row - 1]) > MOST_COLUMNS]


def source_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def broken(check: str, paths: list[Path], *arguments: object) -> Iterator[str]:
    for path in paths:
        for line in globals()[check](source_of(path), *arguments):
            yield f"{name_of(path)}:{line}"


# ---- The rules -----------------------------------------------------------------------------------------------------


def test_no_flag_of_the_command_line_is_in_a_string_outside_cli():
    outside = [path for path in MODULES if SOURCE / "cli" not in path.parents]
    assert list(broken("flags_in_strings", outside)) == []


def test_few_modules_lie_beside_the_packages():
    modules = [path.name for path in SOURCE.glob("*.py")]
    assert len(modules) <= MOST_MODULES, modules


def test_import_order_has_few_rows():
    settings = tomllib.loads(source_of(ROOT / "pyproject.toml"))
    contracts = settings["tool"]["importlinter"]["contracts"]
    (layers,) = [contract["layers"] for contract in contracts if contract["containers"] == ["trackstar"]]
    assert len(layers) <= MOST_LAYERS, layers


def test_functions_are_short():
    assert list(broken("long_functions", MODULES)) == []


def test_internal_functions_have_few_parameters():
    assert list(broken("wide_functions", MODULES, set(trackstar.__all__))) == []


def test_readme_is_two_screens():
    assert len(source_of(ROOT / "README.md").splitlines()) <= MOST_README_LINES


def test_pages_are_wrapped():
    assert list(broken("wide_prose", PAGES)) == []


def test_docstrings_and_comments_are_wrapped():
    assert list(broken("wide_comments", MODULES)) == []


# ---- Each check can fail -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    ['x = "give --top 3"', 'x = f"{y} --batch-tokens {z}"', '"""See `trackstar query --out`."""', "x = '(--side)'"],
)
def test_flags_are_found(source: str):
    assert len(flags_in_strings(source)) == 1


def test_other_dashes_are_no_flags():
    assert flags_in_strings('x = "a -- b, a--b, ---, -k, well-known, --, <!-- no -->"  # --top') == []


def test_long_functions_are_found_without_their_comments():
    code = "\n".join(f"    x{number} = {number}" for number in range(MOST_CODE_LINES - 1))
    comments = '    """Docstring\n    of\n\n    four lines."""\n\n    # A comment.\n'
    assert long_functions(f"def f():\n{comments}{code}\n") == []
    assert long_functions(f"def f():\n{comments}{code}\n    y = 1\n") == ["f: 61 lines"]
    assert long_functions(f"class C:\n    async def g(self):\n{code.replace('    ', '        ')}\n        y = 1\n")


def test_wide_functions_are_found_unless_public():
    names = ", ".join(f"a{number}" for number in range(MOST_PARAMETERS))
    assert wide_functions(f"def f({names}): ...", set()) == []
    assert wide_functions(f"def f({names}, *, b): ...", set()) == ["f: 11 parameters"]
    assert wide_functions(f"def f({names}, *, b): ...", {"f"}) == []
    method = f"class C:\n    def g(self, {names}): ...\n    def h(self, {names}, b): ..."
    assert wide_functions(method, set()) == ["h: 11 parameters"]
    assert wide_functions(method, {"C"}) == []
    assert wide_functions(f"@click.command(cls=C)\ndef f({names}, b): ...", set()) == []


def test_wide_prose_is_found_but_no_wide_code():
    wide = "word " * 23
    assert wide_prose(wide) == ["1: 115 columns"]
    assert wide_prose(f"* {wide}")
    for page in (f"    {wide}", f"```text\n{wide}\n```", f"| {wide} |", f"* [{wide}](there.md)", f"![{wide}](x.png)"):
        assert wide_prose(page) == [], page
    assert wide_prose(f"```text\ncode\n```\n{wide}") == ["4: 115 columns"]


def test_wide_comments_are_found_but_no_wide_code():
    wide = "word " * 23
    assert wide_comments(f'"""{wide}"""') == ["1: 121 columns"]
    assert wide_comments(f'def f():\n    """Short.\n\n    {wide}\n    """') == ["4: 119 columns"]
    assert wide_comments(f"# {wide}\nx = 1") == ["1: 117 columns"]
    assert wide_comments(f"x = '{wide}'  # short") == []
