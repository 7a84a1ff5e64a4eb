"""What a command imports: the time until its first line, before any work, is that of Python, torch and the model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from capitals import TEXTS
from trackstar.indexing.build import build_index

# Runs code and prints the names of all modules that it has imported.
REPORTING = """
import atexit, json, sys
atexit.register(lambda: print("MODULES", json.dumps(sorted(sys.modules)), file=sys.stderr))
"""
# Small packages that a command needs beside torch.
SMALL = {"click", "filelock", "jaxtyping", "psutil", "typing_extensions", "xxhash"}


def modules_of(code: str, *arguments: str) -> set[str]:
    """Names of the modules that a fresh interpreter has imported at the end of the code."""
    done = subprocess.run(
        [sys.executable, "-c", REPORTING + code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("MODULES ")]
    return set(json.loads(line.removeprefix("MODULES ")))


def packages_of(modules: set[str]) -> set[str]:
    """Packages among modules that are neither ours nor Python's."""
    found = {name.partition(".")[0] for name in modules} - sys.stdlib_module_names - {"trackstar", "__mp_main__"}
    return {name for name in found if not name.startswith("_")}


COMMAND = "from trackstar.cli import main\nsys.argv[0] = 'trackstar'\nmain()\n"


@pytest.fixture(scope="module")
def index(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("startup") / "index"
    build_index(tiny_model_folder, TEXTS, out, layer_blocks=2, side=8, codec="float16", progress=False)
    return out


def test_verify_imports_torch_and_nothing_else_that_is_large(index: Path):
    torch_alone, verify = modules_of("import torch\n"), modules_of(COMMAND, "verify", str(index))
    assert packages_of(verify) - packages_of(torch_alone) <= SMALL | {"numpy"}
    assert "transformers" not in verify
    assert "sympy" not in packages_of(verify) - packages_of(torch_alone)


def test_query_imports_what_loading_its_model_imports(index: Path, tiny_model_folder: Path):
    """No other family of models, and nothing compiled, which only low-bit stores need."""
    loading = """
import torch, transformers
transformers.AutoTokenizer.from_pretrained(sys.argv[1])
transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
"""
    loaded = modules_of(loading, str(tiny_model_folder))
    query = modules_of(COMMAND, "query", str(index), "--prompt", "The capital of Peru is", "--completion", "Lima")
    assert packages_of(query) - packages_of(loaded) <= SMALL | {"rich"}
    families = {name for name in query if name.startswith("transformers.models.")}
    assert families <= {name for name in loaded if name.startswith("transformers.models.")}
    assert not query & {"numba", "ray", "pyarrow", "matplotlib", "fastapi", "sklearn", "peft"} - loaded
