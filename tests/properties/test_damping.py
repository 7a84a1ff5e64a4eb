"""Damping means one thing: R = λ R_eval + (1-λ)(R_train + cI) in projected and in whitened coordinates."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

import reference
from small_index import SECOND_MOMENT, small_example, small_manifest
from trackstar.curvature.autocorrelation import autocorrelation
from trackstar.curvature.task import task_correction
from trackstar.curvature.whitening import whitening
from trackstar.errors import CurvatureError
from trackstar.retrieval.scoring import all_scores, trackstar_scorer
from trackstar.store import Index, IndexWriter, Manifest, ShardContent, WhiteningEntry, encode, tensors_digest

BLOCKS, DIM = 2, 64
MIXINGS = (0.0, 0.5, 0.9, 0.99)
DAMPINGS = (0.0, 0.1, 1.0)


def gradients(rows: int, seed: int) -> Tensor:
    """φ whose principal directions differ in size by a factor of ten, in float64."""
    draw = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(BLOCKS, DIM, DIM, generator=draw, dtype=torch.float64)).Q
    scales = torch.logspace(0, -1, DIM, dtype=torch.float64)
    phi = torch.randn(BLOCKS, rows, DIM, generator=draw, dtype=torch.float64) * scales
    return torch.bmm(phi, rotation).transpose(0, 1).reshape(rows, -1)


CANDIDATES, QUERIES = gradients(400, seed=1), gradients(12, seed=2)


def written(path: Path, manifest: Manifest, tensors: dict[str, dict[str, Tensor]], rows: Tensor) -> Index:
    """The finished index of these rows."""
    with IndexWriter.open(path, manifest) as writer:
        for name, tensor in tensors.items():
            writer.write_tensors(name, tensor)
        examples = [small_example(number) for number in range(len(rows))]
        writer.write_shard(
            ShardContent(
                stored=encode(rows.float(), "float32", BLOCKS),
                losses=torch.ones(len(rows)),
                examples=examples,
                next_record=len(rows),
                next_window=0,
                skipped=0,
            )
        )
        writer.finish(records=len(rows), skipped=0)
    return Index.open(path)


@pytest.fixture(scope="module")
def r_train() -> Tensor:
    return autocorrelation(CANDIDATES.float(), BLOCKS)


@pytest.fixture(scope="module")
def projected(tmp_path_factory: pytest.TempPathFactory, r_train: Tensor) -> Index:
    manifest = dataclasses.replace(small_manifest("float32", side=8), shard_examples=len(CANDIDATES))
    tensors = {"second_moment": SECOND_MOMENT, "autocorrelation": {"autocorrelation": r_train}}
    return written(tmp_path_factory.mktemp("projected") / "index", manifest, tensors, CANDIDATES)


def whitened(path: Path, r_train: Tensor, damping: float) -> Index:
    """The same candidates in train-whitened coordinates."""
    train = whitening(r_train, damping=damping, rotation=3)
    tensors = {"second_moment": SECOND_MOMENT, "whitening": {"whitening": train.factors}}
    entry = WhiteningEntry(source="all", damping=damping, digest=tensors_digest(tensors["whitening"]))
    manifest = dataclasses.replace(
        small_manifest("float32", side=8), coordinates="whitened", whitening=entry, shard_examples=len(CANDIDATES)
    )
    return written(path, manifest, tensors, train.apply(CANDIDATES.float()))


def influences(index: Index, mixing: float, damping: float) -> Tensor:
    correction = task_correction(index, QUERIES.float(), mixing=mixing, damping=damping)
    coordinates = correction.coordinates(QUERIES.float())
    return all_scores(index, trackstar_scorer(index, coordinates, correction.whitening, key=correction.key)).double()


def reference_influences(mixing: float, damping: float) -> Tensor:
    phi = {"queries": QUERIES, "candidates": CANDIDATES}
    blocks = {name: {str(n): part for n, part in enumerate(x.chunk(BLOCKS, dim=1))} for name, x in phi.items()}
    roots = {
        number: reference.whitening(
            reference.mix(
                reference.autocorrelation(blocks["queries"][number]),
                reference.autocorrelation(blocks["candidates"][number]),
                mixing,
                damping=damping,
            )
        )
        for number in blocks["queries"]
    }
    return reference.influences(blocks["queries"], blocks["candidates"], roots)


@pytest.mark.parametrize("damping", DAMPINGS)
def test_projected_and_whitened_indexes_give_the_same_influences(
    projected: Index, r_train: Tensor, damping: float, tmp_path: Path
):
    other = whitened(tmp_path / "index", r_train, damping)
    for mixing in MIXINGS:
        expected = reference_influences(mixing, damping)
        found = [influences(index, mixing, damping) for index in (projected, other)]
        torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-4)
        for one in found:
            torch.testing.assert_close(one, expected, rtol=0, atol=1e-4)


def test_r_eval_alone_is_not_damped_and_a_singular_one_is_refused(r_train: Tensor):
    few = autocorrelation(QUERIES.float(), BLOCKS)
    with pytest.raises(CurvatureError, match=r"block 0: R is singular .* pass a smaller `mixing`"):
        whitening(r_train, few, mixing=1.0, damping=0.5)
    full = autocorrelation(gradients(200, seed=5).float(), BLOCKS)
    alone = whitening(r_train, full, mixing=1.0, damping=0.5)
    torch.testing.assert_close(alone.factors, whitening(full).factors)
