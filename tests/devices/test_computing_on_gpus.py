"""What one GPU, several GPUs or an Apple GPU compute is what the CPU computes; the devices are pretended."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import trackstar
from comparisons import random_examples
from pretended_devices import pretended_devices
from trackstar.choices import CodecName, ProjectionKind
from trackstar.gradients.estimated_moment import estimate_second_moment
from trackstar.gradients.projector import GradientProjector, projected
from trackstar.gradients.token_split import ProjectionSettings, split_over_tokens
from trackstar.model.language_model import LanguageModel, load_model
from trackstar.store import Index
from trackstar.tail_patch import Pair, TrainingStep, tail_patch

ACROSS = {
    "model.embed_tokens": "cuda:1", "model.rotary_emb": "cuda:0", "model.layers.0": "cuda:0",
    "model.layers.1": "cuda:1", "model.layers.2": "cuda:1", "model.norm": "cuda:0", "lm_head": "cuda:1",
}  # fmt: skip
"""Every part reads what another GPU has computed; a linear layer's inputs come from another GPU, too."""

MACHINES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one GPU": ({"gpus": 1}, {}),
    "two GPUs": ({"gpus": 2}, {"device_map": "auto"}),
    "across GPUs": ({"gpus": 2}, {"device_map": ACROSS}),
    "an Apple GPU": ({"mps": True}, {}),
}
DEVICES = {
    "one GPU": "cuda:0", "two GPUs": "cuda:0, cuda:1", "across GPUs": "cuda:0, cuda:1",
    "an Apple GPU": "mps:0",
}  # fmt: skip
CAPITALS = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Peru": "Lima", "Kenya": "Nairobi", "Cuba": "Havana"}

Computed = Callable[[LanguageModel], Any]


def same_everywhere(folder: Path, machine: str, compute: Computed) -> tuple[Any, Any]:
    """What the CPU and a machine compute with a model."""
    expected = compute(load_model(folder, device="cpu", layer_blocks=2))
    settings, options = MACHINES[machine]
    with pretended_devices(**{"gpus": 0, "mps": False, **settings}):
        model = load_model(folder, layer_blocks=2, **options)
        assert model.device_names == DEVICES[machine]
        return expected, compute(model)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("kind", ["two-sided", "one-sided"])
def test_gradients_and_their_split_over_tokens_are_those_of_the_cpu(
    machine: str, kind: ProjectionKind, tiny_model_folder: Path
):
    examples = random_examples([9, 5, 12])

    def compute(model: LanguageModel) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        moment = estimate_second_moment(model, examples)
        with GradientProjector(
            model, moment, seed=0, side=4, batch_tokens=24, note=lambda _: None, kind=kind
        ) as projector:
            phi, losses = projected(projector, examples)
        vectors = torch.linspace(-1, 1, phi.numel()).view(phi.shape)
        parts = split_over_tokens(
            model, moment, examples, vectors, ProjectionSettings(seed=0, side=4, kind=kind), batch_tokens=24
        )
        return phi, losses, parts

    expected, found = same_everywhere(tiny_model_folder, machine, compute)
    assert all(type(tensor) is torch.Tensor for tensor in (*found[:2], *found[2]))  # on the CPU
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("path", ["fast", "exact"])
@pytest.mark.parametrize("architecture", ["llama-tied", "gpt2"])
def test_tail_patch_is_that_of_the_cpu(machine: str, path: Any, architecture: str, tiny_model_folders: Any):
    if architecture == "gpt2" and isinstance(MACHINES[machine][1].get("device_map"), dict):
        pytest.skip("the map names a Llama's parts")
    if architecture == "llama-tied" and machine == "across GPUs":
        architecture = "llama"
    examples = random_examples([9, 5, 12, 7])
    pairs = [Pair(query=0, proponent=2), Pair(query=1, proponent=2), Pair(query=1, proponent=3)]

    def compute(model: LanguageModel) -> np.ndarray:
        from transformers.optimization import Adafactor

        optimizer = Adafactor(model.module.parameters(), lr=0.05, relative_step=False, scale_parameter=True)
        step = TrainingStep.from_optimizer(optimizer, model)
        return tail_patch(model, step, examples, examples, pairs, path=path).effect

    expected, found = same_everywhere(tiny_model_folders(architecture), machine, compute)
    assert (np.abs(expected) > 0).all()
    np.testing.assert_allclose(found, expected, rtol=0.02, atol=1e-9)


@pytest.mark.parametrize("machine", ["one GPU", "two GPUs", "an Apple GPU"])
@pytest.mark.parametrize("codec", ["float16", "1-bit"])
def test_an_index_and_its_answers_are_those_of_the_cpu_and_no_device_is_recorded_in_it(
    machine: str, codec: CodecName, tiny_model_folder: Path, tmp_path: Path
):
    data = tmp_path / "corpus.jsonl"
    texts = [f"The capital of {country} is {city}." for country, city in CAPITALS.items()]
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    queries = [
        trackstar.Query(query_id=country, prompt=f"The capital of {country} is", completion=city)
        for country, city in list(CAPITALS.items())[:2]
    ]

    def compute(name: str, **options: Any) -> tuple[Index, trackstar.QueryReport]:
        index = trackstar.build_index(
            tiny_model_folder, data, tmp_path / name, side=8, layer_blocks=1, codec=codec, progress=False, **options
        )
        return index, trackstar.answer_queries(index, queries, k=6, mixing=0.3, progress=False, **options)

    expected_index, expected = compute("cpu", device="cpu")
    settings, options = MACHINES[machine]
    with pretended_devices(**{"gpus": 0, "mps": False, **settings}):
        index, report = compute("gpu", **options)
    assert expected.provenance is not None
    assert report.provenance is not None
    assert (expected.provenance.device, report.provenance.device) == ("cpu", DEVICES[machine])
    assert not any(name in index.manifest.to_json() for name in ("cuda", "mps", '"device'))
    assert index.manifest.model == expected_index.manifest.model
    for found, right in zip(report.results, expected.results, strict=True):
        of = {one.row: one.influence for one in found.proponents}
        assert of.keys() == {one.row for one in right.proponents}
        for one in right.proponents:
            assert of[one.row] == pytest.approx(one.influence, rel=1e-3, abs=1e-5)


def test_a_question_is_streamed_on_an_apple_gpu(tiny_model_folder: Path, tmp_path: Path):
    data = tmp_path / "corpus.txt"
    data.write_text("".join(f"The capital of {country} is {city}.\n" for country, city in CAPITALS.items()), "utf-8")
    query = trackstar.Query(query_id="Peru", prompt="The capital of Peru is", completion="Lima")

    def influences(**options: Any) -> dict[int, float]:
        report = trackstar.stream_queries(tiny_model_folder, data, [query], side=4, progress=False, **options)
        return {one.row: one.influence for one in report.results[0].proponents}

    expected = influences(device="cpu")
    with pretended_devices(0, mps=True):
        assert influences() == pytest.approx(expected, rel=1e-3, abs=1e-5)
