"""R_train of few examples in low-rank form, held against square matrices in float64, and indexes that use it."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import reference
from capitals import QUERIES, TEXTS
from capitals_oracle import DAMPING, assert_report_equals, expected, influences_of
from comparisons import language_model
from trackstar.attribution.answering import answer_queries
from trackstar.attribution.streaming import stream_queries
from trackstar.curvature.low_rank_whitening import LowRankWhitening
from trackstar.curvature.task import task_correction, train_autocorrelation, train_spectrum, train_whitening
from trackstar.curvature.train_autocorrelation import FewExamples, SquareAutocorrelation
from trackstar.curvature.whitening import Whitening
from trackstar.editing.adding import add_examples
from trackstar.editing.converting import convert_index
from trackstar.editing.merging import merge_indexes
from trackstar.editing.removing import remove_examples
from trackstar.errors import CurvatureError, DamagedIndexError, OptionError
from trackstar.indexing.array_tasks import finish_index
from trackstar.indexing.build import build_index
from trackstar.model.language_model import load_model
from trackstar.store import Index, load_manifest, verify

BLOCKS, DIM = 2, 100
NAMES = [f"block {number}" for number in range(BLOCKS)]


def gradients(rows: int, seed: int) -> Tensor:
    """φ whose principal directions differ in size by a factor of a hundred; the last two rows are one and zero."""
    draw = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -2, DIM)
    phi = (torch.randn(rows, BLOCKS, DIM, generator=draw) * scales).reshape(rows, -1)
    if rows > 3:
        phi[-2], phi[-1] = phi[0], 0.0
    return phi


def few_and_square(rows: int) -> tuple[FewExamples, SquareAutocorrelation]:
    few = FewExamples(phi=gradients(rows, 1), blocks=BLOCKS)
    return few, SquareAutocorrelation(matrices=few.square(), examples=rows)


def inverse_of(phi: Tensor, task: Tensor | None, mixing: float, damping: float) -> list[np.ndarray]:
    """R⁻¹ of each block by the formula as written."""
    inverses = []
    for number in range(BLOCKS):
        part = slice(number * DIM, (number + 1) * DIM)
        r_train = reference.autocorrelation(phi[:, part].double())
        r_eval = torch.zeros_like(r_train) if task is None else reference.autocorrelation(task[:, part].double())
        r = mixing * r_eval + (1 - mixing) * (r_train + damping * r_train.diagonal().mean() * torch.eye(DIM).double())
        inverses.append(np.linalg.inv(r.numpy()))
    return inverses


@pytest.mark.parametrize("rows", [1, 2, 9, 30])
def test_spectrum_and_shrinkage_equal_those_of_the_square_form(rows: int):
    few, square = few_and_square(rows)
    assert few.shrinkage() == pytest.approx(square.shrinkage(), rel=1e-4)
    values, wanted = few.spectrum(), square.spectrum()
    torch.testing.assert_close(values[:rows], wanted[:rows], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mixing", [0.0, 0.4, 0.95])
@pytest.mark.parametrize("damping", [1e-6, 1e-2, 1.0])
@pytest.mark.parametrize("rotation", [None, 5])
def test_low_rank_whitening_equals_the_direct_formula(mixing: float, damping: float, rotation: int | None):
    few, _ = few_and_square(30)
    task, rows = gradients(12, 2), gradients(20, 3)
    w = few.whitening(task, mixing=mixing, damping=damping, names=NAMES, rotation=rotation)
    assert isinstance(w, LowRankWhitening)
    assert w.rank <= 29 + 12
    inverses = inverse_of(few.phi, task, mixing, damping)
    u, inverted = w.apply(rows), w.apply_inverse(rows)
    for number, inverse in enumerate(inverses):
        part = slice(number * DIM, (number + 1) * DIM)
        wanted = torch.from_numpy(inverse)
        scale = float(wanted.diagonal().max())
        x = rows[:, part].double()
        products = u[:, part].double() @ u[:, part].double().T
        torch.testing.assert_close(products / scale, x @ wanted @ x.T / scale, rtol=0, atol=3e-6)
        torch.testing.assert_close(inverted[:, part].double() / scale, x @ wanted / scale, rtol=0, atol=3e-6)
    torch.testing.assert_close(w.norms(rows), torch.linalg.vector_norm(u, dim=1), rtol=1e-5, atol=0)
    # Wᵀ is the transpose of W.
    other = gradients(7, 4)
    scale = float(u.abs().max())
    torch.testing.assert_close(w.apply_transposed(other) @ rows.T / scale, other @ u.T / scale, rtol=0, atol=1e-5)


def test_many_queries_make_the_form_square():
    few, square = few_and_square(30)
    task = gradients(60, 2)
    options: dict[str, Any] = {"mixing": 0.5, "damping": 0.1, "names": NAMES}
    found, wanted = few.whitening(task, **options), square.whitening(task, **options)
    assert isinstance(found, Whitening)
    torch.testing.assert_close(found.factors, wanted.factors)


def test_what_cannot_be_inverted_is_refused_as_in_the_square_form():
    few, square = few_and_square(9)
    for options, error, words in (
        ({"damping": 0.0}, CurvatureError, r"block 0: R is singular with damping 0; .* pass more damping"),
        ({"damping": 0.1, "mixing": 1.0}, CurvatureError, r"block 0: R is singular with `mixing=1`"),
        ({"damping": 1e300}, OptionError, r"`damping`: nothing is left of R_train"),
        ({"damping": -1.0}, OptionError, "`damping`"),
    ):
        for one in (few, square):
            with pytest.raises(error, match=words):
                one.whitening(gradients(4, 2), names=NAMES, **options)  # pyright: ignore[reportArgumentType]
    zero = FewExamples(phi=torch.zeros(3, BLOCKS * DIM), blocks=BLOCKS)
    with pytest.raises(CurvatureError, match="no example has a gradient in this block"):
        zero.whitening(damping=0.1, names=NAMES)
    broken = FewExamples(phi=torch.full((3, BLOCKS * DIM), torch.nan), blocks=BLOCKS)
    with pytest.raises(CurvatureError, match="expected finite gradients"):
        broken.whitening(damping=0.1, names=NAMES)


# ---- Indexes of fewer examples than a third of a block's dimensions ------------------------------------------------

SIDE = 16  # 256 dimensions in a block, and 24 texts


def build(folder: Path, out: Path, texts: object = TEXTS, **options: Any) -> Index:
    settings = {"layer_blocks": 2, "side": SIDE, "seed": 5, "progress": False, "codec": "float32"}
    return build_index(folder, texts, out, **{**settings, **options})


@pytest.mark.parametrize("mixing", [None, 0.0])
@pytest.mark.parametrize("options", [{}, {"coordinates": "whitened"}, {"codec": "1-bit"}], ids=["φ", "u", "1-bit"])
def test_ranked_examples_equal_the_references(
    options: dict[str, Any], mixing: float | None, tiny_model_folder: Path, tmp_path: Path
):
    wanted = expected(language_model("llama"), QUERIES, mixing=mixing, side=SIDE)
    if options:
        options = {**options, "damping": DAMPING}
    index = build(tiny_model_folder, tmp_path / "index", **options)
    names = {file.name for file in (tmp_path / "index").glob("*.safetensors")}
    assert names == {"second_moment.safetensors"} | ({"whitening.safetensors"} if options else set())
    verified = verify(tmp_path / "index")
    assert verified.ok
    assert not verified.notes
    report = answer_queries(
        index, QUERIES, k=len(TEXTS), mixing=mixing, damping=DAMPING, progress=False,
        reranked=len(TEXTS) if "codec" in options else None,
    )  # fmt: skip
    assert_report_equals(report, wanted)


def test_a_stream_gives_the_indexs_influences(tiny_model_folder: Path, tmp_path: Path):
    index = build(tiny_model_folder, tmp_path / "index")
    report = answer_queries(index, QUERIES, k=len(TEXTS), progress=False)
    model = load_model(tiny_model_folder, layer_blocks=2)
    streamed = stream_queries(model, TEXTS, QUERIES, k=len(TEXTS), side=SIDE, seed=5, progress=False)
    assert streamed.damping == pytest.approx(report.damping)
    assert streamed.mixing.value == pytest.approx(report.mixing.value, rel=1e-5)
    torch.testing.assert_close(influences_of(streamed), influences_of(report), rtol=0, atol=1e-4)


def test_the_whitening_of_few_examples_is_small_and_read_as_written(tiny_model_folder: Path, tmp_path: Path):
    index = build(tiny_model_folder, tmp_path / "index", codec="1-bit")
    entry = index.manifest.whitening
    assert entry is not None
    assert entry.rank is not None
    assert 20 <= entry.rank <= len(TEXTS)
    blocks = len(index.manifest.layer_blocks)
    size = (tmp_path / "index" / "whitening.safetensors").stat().st_size
    assert size <= blocks * (len(TEXTS) * (SIDE**2 + 1) + 1) * 4 + 4096
    w, projected = train_whitening(index), build(tiny_model_folder, tmp_path / "projected")
    r_train = train_autocorrelation(projected)
    assert isinstance(r_train, FewExamples)
    eye = torch.eye(SIDE**2).repeat(1, blocks)
    names = [block.name for block in index.manifest.layer_blocks]
    square = SquareAutocorrelation(matrices=r_train.square(), examples=r_train.examples)
    wanted = square.whitening(damping=entry.damping, names=names).apply_inverse(eye)
    found = w.apply_transposed(w.apply(eye))
    torch.testing.assert_close(found, wanted, rtol=0, atol=3e-3 * float(wanted.abs().max()))
    values, spectrum = train_spectrum(index), train_spectrum(projected)
    torch.testing.assert_close(values, spectrum[: len(values)], rtol=2e-3, atol=float(spectrum[0]) * 1e-4)


@pytest.mark.parametrize("change", ["shape", "negative", "missing"])
def test_a_whitening_that_was_not_written_so_is_refused(change: str, tiny_model_folder: Path, tmp_path: Path):
    from trackstar.curvature.task import checked_whitening

    index = build(tiny_model_folder, tmp_path / "index", codec="1-bit")
    tensors = dict(index.tensors("whitening"))
    if change == "shape":
        tensors["directions"] = tensors["directions"][:, :-1]
    elif change == "negative":
        tensors["values"] = -tensors["values"]
    else:
        del tensors["ridges"]
    with pytest.raises(DamagedIndexError, match=r"whitening\.safetensors: expected"):
        checked_whitening(tensors, index.path, index.manifest)


def test_editing_across_the_limit_gives_the_r_train_of_all_examples(tiny_model_folder: Path, tmp_path: Path):
    """Two indexes of few examples make one of many, and one of many makes one of few, as built at once."""
    side = {"side": 8}  # 64 dimensions: 24 examples are many, 12 are few
    halves = [
        build(tiny_model_folder, tmp_path / f"half {n}", TEXTS[n::2], second_moment="none", **side) for n in (0, 1)
    ]
    whole = build(tiny_model_folder, tmp_path / "whole", [*TEXTS[0::2], *TEXTS[1::2]], second_moment="none", **side)
    assert all(isinstance(train_autocorrelation(one), FewExamples) for one in halves)
    merged = merge_indexes(halves, tmp_path / "merged", duplicate_ids="number", progress=False)
    added = add_examples(
        halves[0], TEXTS[1::2], tmp_path / "added", model=tiny_model_folder, duplicate_ids="number", progress=False
    )
    wanted = train_autocorrelation(whole)
    assert isinstance(wanted, SquareAutocorrelation)
    for index in (merged, added):
        found = train_autocorrelation(index)
        assert isinstance(found, SquareAutocorrelation)
        torch.testing.assert_close(found.matrices, wanted.matrices, rtol=1e-4, atol=1e-6 * float(wanted.matrices.max()))
    names = [stored.example.example_id for shard in whole.shards for stored in shard.examples()]
    thinned = remove_examples(whole, names[12:], tmp_path / "thinned", progress=False)
    assert isinstance(train_autocorrelation(thinned), FewExamples)
    small = convert_index(thinned, tmp_path / "converted", codec="1-bit", progress=False)
    assert small.manifest.whitening is not None
    assert small.manifest.whitening.rank is not None
    direct = task_correction(thinned, torch.empty(0, thinned.dimensions))
    coded = task_correction(small, torch.empty(0, thinned.dimensions))
    assert direct.damping == pytest.approx(coded.damping)
    phi = torch.cat([shard.stored.decode() for shard in thinned.shards])
    torch.testing.assert_close(coded.coordinates(phi).norm(dim=1), direct.whitening.norms(phi), rtol=1e-3, atol=0)


def test_tasks_of_an_array_and_resumed_runs_make_the_same_index(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    options = {"side": 8, "shard_examples": 5, "second_moment": "none"}
    whole = build(tiny_model_folder, tmp_path / "whole", **options)
    for share in ("2/2", "1/2"):
        build(tiny_model_folder, tmp_path / "parts", share=share, **options)
    parts = finish_index(tmp_path / "parts", progress=False)
    from trackstar.indexing import shard_writing

    original, left = shard_writing.IndexWriter.write_shard, 0

    def stopping(self: shard_writing.IndexWriter, content: object) -> object:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return original(self, content)  # pyright: ignore[reportArgumentType]

    with monkeypatch.context() as patch:
        patch.setattr(shard_writing.IndexWriter, "write_shard", stopping)
        for left in (1, 2, 1):  # noqa: B007  (`stopping` counts it down)
            with contextlib.suppress(KeyboardInterrupt):
                build(tiny_model_folder, tmp_path / "resumed", **options)
        manifest = load_manifest(tmp_path / "resumed")
        assert manifest is not None
        assert manifest.completion is None
    resumed = build(tiny_model_folder, tmp_path / "resumed", **options)
    matrices = [one.tensors("autocorrelation")["autocorrelation"] for one in (whole, parts, resumed)]
    assert all(torch.equal(one, matrices[0]) for one in matrices)
