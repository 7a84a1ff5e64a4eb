"""Nothing in the package unpickles, evaluates text or starts a program: docs/security.md says so."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "trackstar"
SOURCES = sorted(PACKAGE.rglob("*.py"))
MODULES = {"subprocess", "shelve", "marshal", "dill", "cloudpickle", "joblib", "yaml", "ctypes"}
STARTED = re.compile("system$|popen$|exec[lv]|spawn|posix_spawn|fork")
CALLS = {"eval", "exec", "compile", "__import__"}
# The only program that is started: this interpreter, isolated, with a constant text as its program.
MATCHER = PACKAGE / "model" / "user_patterns.py"
# The records of a Python iterator, kept in a temporary file without a name so that they can be read again.
SPOOL = PACKAGE / "corpus" / "sources.py"
# The C library of this process is asked to give freed memory back to the system.
MACHINE = PACKAGE / "indexing" / "machine.py"
EXCEPTIONS = {MATCHER: ["subprocess"], SPOOL: ["pickle.load", "pickle.dump"], MACHINE: ["ctypes"]}
COMMAND = '[sys.executable, "-I", "-S", "-c", _MATCH]'


def wrong(source: str) -> list[str]:
    """What a source file does that none may."""
    found = []
    nodes = list(ast.walk(ast.parse(source)))
    called_nodes = {id(node.func) for node in nodes if isinstance(node, ast.Call)}  # `_wrong_call` looks at these
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names if name.name.split(".")[0] in MODULES]
            found += [f"{name.name} as {name.asname}" for name in node.names if name.name == "pickle" and name.asname]
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").split(".")[0] in MODULES | {"pickle"}:
                found.append(f"from {node.module}")
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            called = f"{node.value.id}.{node.attr}"
            starts = node.value.id == "os" and STARTED.match(node.attr)
            unpickles = node.value.id == "pickle" and node.attr != "UnpicklingError"
            loads = called == "np.load" and id(node) not in called_nodes
            if starts or unpickles or loads or called == "psutil.Popen":
                found.append(called)
        if isinstance(node, ast.Call):
            found += _wrong_call(node)
    return found


def _wrong_call(node: ast.Call) -> list[str]:
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    if isinstance(node.func, ast.Name) and node.func.id in CALLS:
        return [node.func.id]
    if isinstance(node.func, ast.Attribute):
        name = node.func.attr
        if name == "load" and ast.unparse(node.func) == "np.load" and not _is(given.get("allow_pickle"), False):
            return ["np.load without allow_pickle=False"]
        if name == "load" and ast.unparse(node.func) == "torch.load" and not _is(given.get("weights_only"), True):
            return ["torch.load without weights_only=True"]
        # An adapter's configuration is JSON alone, and its reader has no such parameter.
        of_adapter = isinstance(node.func.value, ast.Name) and node.func.value.id == "PeftConfig"
        if name == "from_pretrained" and not of_adapter and not _is(given.get("trust_remote_code"), False):
            return ["from_pretrained without trust_remote_code=False"]
    return []


def _is(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_source_file_runs_what_it_reads(path: Path):
    assert wrong(path.read_text(encoding="utf-8")) == EXCEPTIONS.get(path, [])


def test_the_only_program_that_is_started_is_a_constant_one():
    tree = ast.parse(MATCHER.read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    started = [call for call in calls if ast.unparse(call.func).startswith("subprocess.")]
    assert [ast.unparse(call.args[0]) for call in started] == [ast.unparse(ast.parse(COMMAND, mode="eval"))]
    assert not [keyword for call in started for keyword in call.keywords if keyword.arg in ("shell", "executable")]
    (program,) = [
        node for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_MATCH"
    ]
    assert isinstance(program.value, ast.Constant)


def test_of_the_c_library_that_is_loaded_one_function_is_called():
    used = [
        node
        for node in ast.walk(ast.parse(MACHINE.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "ctypes"
    ]
    assert [ast.unparse(node) for node in used] == ["ctypes.CDLL"]
    assert 'getattr(ctypes.CDLL(None), "malloc_trim", None)' in MACHINE.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "source",
    [
        "import subprocess", "import yaml.cyaml", "from pickle import loads", "import pickle; pickle.loads(b'')",
        "eval('1')", "import os; os.system('ls')", "import os; os.execv('x', [])", "import psutil; psutil.Popen('x')",
        "import pickle as p; p.loads(b'')", "import torch; torch.load('x')",
        "import torch; torch.load('x', weights_only=False)", "AutoModel.from_pretrained('x', trust_remote_code=True)",
        "AutoModel.from_pretrained('x')", "import numpy as np; np.load('x')", "np.load('x', allow_pickle=True)",
        "read = np.load",
    ],
)  # fmt: skip
def test_the_check_finds_what_it_looks_for(source: str):
    assert wrong(source)
