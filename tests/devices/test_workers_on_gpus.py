"""Each of a cluster's workers computes on the GPU that the cluster gives it, or on all of several."""

import types
from pathlib import Path
from typing import Any

import pytest
import torch

import trackstar
from pretended_devices import pretended_devices
from trackstar.workers import ray_pool
from trackstar.workers.index_model import second_moment_of_index
from trackstar.workers.protocol import GradientWork
from trackstar.workers.ray_actor import GradientJob, Worker
from trackstar.workers.ray_pool import Pool
from trackstar.workers.setups import GradientSetup


def devices_of(projector: Any, _part: Any, _advance: Any) -> str:
    """The devices of a worker's model."""
    return projector._model.device_names


@pytest.fixture(scope="module")
def job(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> GradientJob:
    folder = tmp_path_factory.mktemp("workers")
    (folder / "corpus.txt").write_text("The capital of Peru is Lima.\nThe capital of Cuba is Havana.\n", "utf-8")
    index = trackstar.build_index(
        tiny_model_folder,
        folder / "corpus.txt",
        folder / "index",
        side=4,
        codec="float16",
        device="cpu",
        progress=False,
    )
    setup = GradientSetup(manifest=index.manifest, second_moment=second_moment_of_index(index), batch_tokens=64)
    work: GradientWork = devices_of
    return GradientJob(source=str(tiny_model_folder), revision=None, gguf_file=None, setup=setup, work=work)


@pytest.mark.parametrize(
    ("gpus", "visible", "expected"),
    [(0.0, 2, "cpu"), (0.5, 1, "cuda:0"), (1.0, 1, "cuda:0"), (2.0, 2, "cuda:0, cuda:1")],
)
def test_a_worker_computes_on_its_gpus(gpus: float, visible: int, expected: str, job: GradientJob):
    threads = torch.get_num_threads()
    with pretended_devices(visible, mps=False):
        worker = Worker(threads, gpus)
        worker.prepare(job)
        assert worker.compute(None).result == expected


def test_a_pool_asks_for_the_gpus_of_each_worker_and_says_so(monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[Any, ...]] = []

    def options(**resources: Any) -> Any:
        return types.SimpleNamespace(remote=lambda *arguments: asked.append((resources["num_gpus"], *arguments)))

    ray = types.SimpleNamespace(
        nodes=lambda: [{"Alive": True, "Resources": {"CPU": 8.0, "GPU": 2.0}}],
        available_resources=lambda: {"CPU": 8.0, "GPU": 2.0},
        remote=lambda _worker: types.SimpleNamespace(options=options),
    )
    monkeypatch.setattr(ray_pool.importlib, "import_module", lambda _name: ray)
    notes: list[str] = []
    Pool(most=None, cpus=4, gpus=1.0, note=notes.append)
    assert asked == [(1.0, 4, 1.0)] * 2
    assert notes == ["cluster: 2 workers, 1 GPU each"]
