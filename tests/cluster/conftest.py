"""One Ray cluster on this machine for all tests in this folder; it ends with them."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from cluster_work import is_ray

if TYPE_CHECKING:
    from trackstar.model.language_model import LanguageModel
    from trackstar.workers import RayWorkers

# Workers import the tests' work functions, which are pickled by name.
TESTS = str(Path(__file__).parents[1])


def ray_processes() -> list[psutil.Process]:
    """Ray processes that this process started."""
    return [process for process in psutil.Process().children(recursive=True) if is_ray(process)]


@pytest.fixture(scope="session")
def workers() -> Iterator["RayWorkers"]:
    """Workers on a local cluster, two at most."""
    from trackstar.workers import RayWorkers

    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([TESTS, *([before] if before else [])])
    with RayWorkers("local", workers=2) as ray_workers:
        yield ray_workers
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before
    _, alive = psutil.wait_procs(ray_processes(), timeout=10)
    assert not alive


@pytest.fixture(scope="session")
def model(tiny_model_folder: Path) -> "LanguageModel":
    """The tiny model, in two blocks each of attention and MLP."""
    from trackstar.model.language_model import load_model

    return load_model(tiny_model_folder, layer_blocks=2)
