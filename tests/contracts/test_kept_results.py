"""Results saved with an index are reused only if they are valid; otherwise they are recomputed."""

import dataclasses
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from small_index import WHITENING, small_content, small_manifest, write_small_index
from trackstar import store
from trackstar.curvature import task
from trackstar.curvature.low_rank_whitening import LowRankWhitening
from trackstar.curvature.task import task_correction
from trackstar.curvature.whitening import Whitening
from trackstar.errors import DamagedIndexError, OptionError
from trackstar.gradients.second_moment import SecondMoment
from trackstar.indexing.build import build_index
from trackstar.indexing.shard_writing import RunningAutocorrelation
from trackstar.indexing.train_whitening import TrainWhitening
from trackstar.retrieval.reranking import ExactScores, exact_top
from trackstar.retrieval.scoring import whitened_norms
from trackstar.store import Index, index_tensors, tensor_reading
from trackstar.store.tensor_file import TensorFile


@pytest.fixture
def index(tmp_path: Path) -> Index:
    write_small_index(tmp_path / "index")
    return Index.open(tmp_path / "index")


@pytest.mark.parametrize("saved", [{"other": torch.ones(8)}, {"norms": torch.ones(7)}, {"norms": torch.ones(8, 1)}])
def test_saved_norms_of_another_name_or_shape_are_recomputed(index: Index, saved: dict[str, Tensor]) -> None:
    whitening = Whitening(factors=torch.eye(16).repeat(2, 1, 1))
    expected = whitened_norms(index, whitening)
    assert index.save_derived("norms-x", saved)
    assert torch.equal(whitened_norms(index, whitening, key="x"), expected)
    assert index.save_derived("norms-x", {"norms": expected + 1})
    assert torch.equal(whitened_norms(index, whitening, key="x"), expected + 1)


class Scores(ExactScores):
    """Scores of eight candidates for two queries, in parts of four."""

    def __init__(self) -> None:
        pass

    @property
    def queries(self) -> int:
        return 2

    values = torch.tensor([[3.0, 1, 4, 1.5, 9, 2, 6, 5], [2.0, 7, 1, 8, 2.5, 0, 4, 5]])

    def queries_digest(self) -> str:
        return "q"

    def parts(self, rows: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        for first in range(0, len(rows), 4):
            yield first, self.values[:, list(rows[first : first + 4])]


WHOLE = {
    "done": torch.tensor(4),
    "best": torch.tensor([[4.0, 3.0], [8.0, 7.0]]),
    "best_rows": torch.tensor([[2, 0], [3, 1]]),
    "worst": torch.tensor([[-1.0, -1.5], [-1.0, -2.0]]),
    "worst_rows": torch.tensor([[1, 3], [2, 0]]),
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"done": torch.tensor(9)},
        {"done": torch.tensor(float("nan"))},
        {"done": torch.tensor([4])},
        {"best": torch.ones(2, 3)},
        {"best_rows": torch.tensor([[2, 0], [3, 8]])},
        {"worst_rows": torch.tensor([[-1, 0], [3, 1]])},
    ],
)
def test_exact_scores_resume_only_from_a_valid_partial_result(index: Index, changes: dict[str, Tensor]) -> None:
    scores = Scores()
    expected = exact_top(index, scores, 2, key="a")
    assert expected.proponents.tolist() == [[4, 6], [3, 1]]
    assert index.save_derived("exact-b-q-2", WHOLE | changes)
    found = exact_top(index, scores, 2, key="b")
    for name in ("proponents", "proponent_scores", "opponents", "opponent_scores"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


def test_saved_sums_of_another_shape_are_recomputed(tmp_path: Path) -> None:
    manifest = dataclasses.replace(small_manifest(), shard_examples=30)
    with store.IndexWriter.open(tmp_path / "one", manifest) as writer:
        writer.write_shard(small_content(0, 30))  # so many that R_train is stored
        RunningAutocorrelation(writer).write()
        expected = writer.read_tensors("autocorrelation")["autocorrelation"].clone()
        writer.save_progress({"sums.0": torch.ones(2, 3), "sums.1": torch.ones(2, 3)})
    (tmp_path / "one" / "autocorrelation.safetensors").unlink()
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    with store.IndexWriter.open(tmp_path / "two", manifest) as writer:
        RunningAutocorrelation(writer).write()
        assert torch.equal(writer.read_tensors("autocorrelation")["autocorrelation"], expected)


@pytest.mark.parametrize(
    ("saved", "taken"),
    [
        (WHITENING, True),
        ({"other": WHITENING["whitening"]}, False),
        ({"whitening": torch.ones(2, 3)}, False),
        ({"whitening": WHITENING["whitening"].double()}, False),
        ({"whitening": WHITENING["whitening"] * float("nan")}, False),
    ],
)
@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_saved_whitening_is_used_only_if_it_is_valid(
    tmp_path: Path, saved: dict[str, Tensor], taken: bool, elsewhere: bool
) -> None:
    out = f"memory://{tmp_path.name}" if elsewhere else tmp_path
    manifest = small_manifest("int8")
    entry = store.WhiteningEntry(source="all", damping=0.5, digest=store.tensors_digest(saved))
    with store.IndexWriter.open(out, dataclasses.replace(manifest, whitening=entry)) as writer:
        writer.write_tensors("whitening", saved)
    assert (TrainWhitening.written_in(out, damping=None, source="all") is not None) is taken


def test_invalid_tensors_of_a_saved_second_moment_are_ignored() -> None:
    row, column, entries = torch.ones(2), torch.ones(3), torch.ones(2, 3)
    tensors = {"row/a": row, "column/a": column, "entries/b": entries}
    wrong = {
        "x": row,
        "row/c": row,
        "column/d": column,
        "row/e": entries,
        "column/e": column,
        "entries/f": row.double(),
    }
    found = SecondMoment.from_tensors(tensors | wrong, source="estimated", floor=0.0)
    assert found.tensors().keys() == tensors.keys()


def test_verify_does_not_count_up_to_the_number_in_a_file_name(tmp_path: Path) -> None:
    with store.IndexWriter.open(tmp_path, small_manifest()) as writer:
        writer.write_shard(small_content(0, 3))
    (tmp_path / "shards" / f"{10**12}.safetensors").write_bytes(b"")
    report = store.verify(tmp_path)
    assert report.good_shards == (0,)
    assert [f"{10**12}" in problem for problem in report.problems] == [True]
    assert any(f": {10**12 - 1} shards are missing so far, the first of them 1" in note for note in report.notes)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_refused_at_the_start(tmp_path: Path, seed: int) -> None:
    with pytest.raises(OptionError, match=r"projection.seed is -?[0-9]+, expected at least 0 and below 2\^64"):
        store.IndexWriter.open(tmp_path / "index", small_manifest(seed=seed))


def _count_checks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are compared with their digests from now on."""
    compared: list[str] = []
    check = tensor_reading.check_digest

    def counted(file: TensorFile) -> None:
        compared.append(file.path.name)
        check(file)

    monkeypatch.setattr(tensor_reading, "check_digest", counted)
    return compared


def test_a_large_file_of_tensors_is_compared_once_and_again_when_it_changes(
    index: Index, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(index_tensors, "_CHECKED_ONCE", 0)
    path = Path(str(index.path)) / "autocorrelation.safetensors"
    compared = _count_checks(monkeypatch)
    first = index.tensors("autocorrelation")
    again = Index.open(index.path).tensors("autocorrelation")
    assert compared.count(path.name) == 1
    assert again.keys() == first.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())
    content = bytearray(path.read_bytes())
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    content[-1] ^= 1
    with path.open("r+b") as stream:  # in place, with its times put back
        stream.write(content)
    os.utime(path, ns=times)
    with pytest.raises(DamagedIndexError, match=r"autocorrelation\.safetensors"):
        Index.open(index.path).tensors("autocorrelation")


def test_a_check_of_the_index_compares_a_file_whose_comparison_is_kept(index: Index, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(index_tensors, "_CHECKED_ONCE", 0)
    index.tensors("autocorrelation")
    compared = _count_checks(monkeypatch)
    index.check()
    assert "autocorrelation.safetensors" in compared


def test_a_small_file_is_always_compared(index: Index, monkeypatch: pytest.MonkeyPatch):
    compared = _count_checks(monkeypatch)
    for _ in range(2):
        index.tensors("autocorrelation")
    assert compared.count("autocorrelation.safetensors") == 2


@pytest.mark.parametrize("rows", [8, 200], ids=["few", "many"])
def test_the_inverse_of_r_train_is_computed_once_and_kept(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
):
    texts = [f"City {number} lies in country {number % 7}." for number in range(rows)]
    index = build_index(str(tiny_model_folder), texts, tmp_path / "index", side=8, codec="float16", progress=False)
    kind = LowRankWhitening if index.manifest.completion.autocorrelation_digest is None else Whitening  # pyright: ignore[reportOptionalMemberAccess]
    none = torch.zeros(0, index.dimensions)
    first = task_correction(index, none)
    assert isinstance(first.whitening, kind)
    with monkeypatch.context() as patched:
        patched.setattr(task, "train_autocorrelation", lambda _index: pytest.fail("R_train is read again"))
        again = task_correction(Index.open(index.path), none)
    phi = torch.randn(3, index.dimensions, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.whitening.apply_inverse(phi), first.whitening.apply_inverse(phi))
    assert (again.damping, again.damping_rule, again.key) == (first.damping, first.damping_rule, first.key)
    given = task_correction(index, none, damping=first.damping)  # computed, and not what is kept
    assert torch.equal(given.whitening.apply_inverse(phi), first.whitening.apply_inverse(phi))
    for saved in ({"whitening": torch.ones(2)}, {"damping": torch.tensor(0.5), "values": torch.ones(3)}, {}):
        assert index.save_derived("train-whitening-3", saved)
        computed = task_correction(index, none)
        assert torch.equal(computed.whitening.apply_inverse(phi), first.whitening.apply_inverse(phi))
