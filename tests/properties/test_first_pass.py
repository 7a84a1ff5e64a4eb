"""A whitened index's first pass: one gradient an example, a stated sample, and no trace of an interruption."""

import contextlib
from pathlib import Path

import pytest
import torch

from capitals import TEXTS
from trackstar.corpus import TokenizedExample, open_corpus
from trackstar.curvature.task import train_whitening
from trackstar.curvature.train_autocorrelation import FewExamples, SquareAutocorrelation
from trackstar.errors import CurvatureError, IndexMismatchError, OptionError
from trackstar.indexing import shard_writing as indexing
from trackstar.indexing.build import build_index
from trackstar.store import PART_FOLDER, Index, verify


def build(folder: Path, out: Path, **options: object) -> Index:
    settings = {
        "layer_blocks": 2, "side": 8, "codec": "1-bit", "second_moment": "none", "shard_examples": 5, "progress": False,
    }  # fmt: skip
    return build_index(str(folder), TEXTS, out, **{**settings, **options})  # pyright: ignore[reportArgumentType]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts whose gradients are computed."""
    texts: list[str] = []
    original = indexing.GradientProjector.batches

    def noted(self: indexing.GradientProjector, examples: list[TokenizedExample]):
        for places, phi, losses in original(self, examples):
            texts.extend(examples[place].text for place in places)
            yield places, phi, losses

    monkeypatch.setattr(indexing.GradientProjector, "batches", noted)
    return texts


@pytest.mark.parametrize("examples", [9, 1000])
def test_no_gradient_is_computed_twice(examples: int, computed: list[str], tiny_model_folder: Path, tmp_path: Path):
    index = build(tiny_model_folder, tmp_path / "index", whitening_examples=examples)
    assert sorted(computed) == sorted(TEXTS)
    assert index.manifest.whitening is not None
    assert index.manifest.whitening.source == f"of up to {examples} records drawn with seed 0"
    assert not (tmp_path / "index" / PART_FOLDER).exists()
    report = verify(tmp_path / "index")
    assert report.ok
    assert not report.notes


def test_r_train_is_that_of_the_sample(tiny_model_folder: Path, tmp_path: Path):
    index = build(tiny_model_folder, tmp_path / "index", whitening_examples=9, codec="float32", coordinates="whitened")
    drawn = {example.record for example in open_corpus(TEXTS).sample(9, 0)}
    projected = build(tiny_model_folder, tmp_path / "projected", codec="float32")
    phi = torch.cat([shard.stored.decode() for shard in projected.shards])
    sample = phi[sorted(drawn)].double().reshape(9, -1, 64)
    r_train = torch.einsum("nbi,nbj->bij", sample, sample) / 9
    damping = index.manifest.whitening.damping if index.manifest.whitening is not None else 0.0
    means = r_train.diagonal(dim1=1, dim2=2).mean(dim=1)
    damped = r_train + damping * means[:, None, None] * torch.eye(64, dtype=torch.float64)
    # W of each block, from the columns of the identity; nine examples are too few for square matrices.
    blocks = len(r_train)
    w = train_whitening(index).apply(torch.eye(64).repeat(1, blocks)).double().reshape(64, blocks, 64).permute(1, 2, 0)
    identity = torch.bmm(torch.bmm(w, damped), w.mT)
    torch.testing.assert_close(identity, torch.eye(64, dtype=torch.float64).expand_as(identity), rtol=0, atol=5e-3)
    found = torch.cat([shard.stored.decode() for shard in index.shards]).reshape(len(TEXTS), -1, 64).double()
    expected = torch.einsum("bij,nbj->nbi", w, phi.double().reshape(len(TEXTS), -1, 64))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3 * float(expected.abs().max()))


def test_an_interrupted_run_goes_on_wherever_it_was(
    computed: list[str], tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    options = {"whitening_examples": 12, "codec": "2-bit"}
    expected = build(tiny_model_folder, tmp_path / "undisturbed", **options)
    computed.clear()
    monkeypatch.setattr("trackstar.indexing.train_whitening._SHARD_EXAMPLES", 4)
    original = indexing.IndexWriter.write_shard
    left = 0

    def stopping(self: indexing.IndexWriter, content: object) -> object:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return original(self, content)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(indexing.IndexWriter, "write_shard", stopping)
    found, runs = None, 0
    while found is None:
        left, runs = 1, runs + 1
        assert runs < 20
        with contextlib.suppress(KeyboardInterrupt):
            found = build(tiny_model_folder, tmp_path / "index", **options)
    assert runs > 5
    assert found.manifest.whitening is not None
    assert expected.manifest.whitening is not None
    assert found.manifest.whitening.source == expected.manifest.whitening.source
    values = [torch.cat([shard.stored.decode() for shard in index.shards]) for index in (found, expected)]
    assert float(torch.nn.functional.cosine_similarity(*values, dim=1).min()) > 0.98
    assert not (tmp_path / "index" / PART_FOLDER).exists()


def test_another_sample_is_another_index(computed: list[str], tiny_model_folder: Path, tmp_path: Path):
    build(tiny_model_folder, tmp_path / "index", whitening_examples=9)
    computed.clear()
    for options, expected in (
        ({"whitening_examples": 12}, "whitened by R_train of up to 9 records"),
        ({"whitening_examples": 9, "damping": 0.25}, "damping 0.25 was requested"),
        ({"whitening_examples": 9, "codec": "2-bit"}, "the existing index has `codec` '1-bit'"),
        ({"codec": "float16"}, "the existing index has `coordinates` 'whitened'"),
        ({"whitening_examples": 9, "seed": 1}, "was requested"),
    ):
        with pytest.raises(IndexMismatchError, match=expected):
            build(tiny_model_folder, tmp_path / "index", **options)
        assert not (tmp_path / "index" / PART_FOLDER).exists()
    assert not computed
    again = build(tiny_model_folder, tmp_path / "index", whitening_examples=9)
    assert again.rows == len(TEXTS)
    assert not computed


def test_a_whitened_index_is_not_begun_over_an_unfinished_projected_one(
    computed: list[str], tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    original = indexing.IndexWriter.write_shard
    out = tmp_path / "index"

    def stopping(self: indexing.IndexWriter, content: object) -> object:
        if self.shards_done:
            raise KeyboardInterrupt
        return original(self, content)  # pyright: ignore[reportArgumentType]

    with monkeypatch.context() as patch:
        patch.setattr(indexing.IndexWriter, "write_shard", stopping)
        with pytest.raises(KeyboardInterrupt):
            build(tiny_model_folder, out, codec="float16")
    computed.clear()
    with pytest.raises(IndexMismatchError, match="the existing index has `coordinates` 'projected', but 'whitened'"):
        build(tiny_model_folder, out, codec="1-bit")
    assert not computed
    assert not (out / PART_FOLDER).exists()
    assert build(tiny_model_folder, out, codec="float16").rows == len(TEXTS)


@pytest.mark.parametrize("damping", [-0.1, float("nan"), float("inf")])
def test_a_damping_that_cannot_be_is_refused_before_anything_is_computed(
    damping: float, computed: list[str], tiny_model_folder: Path, tmp_path: Path
):
    with pytest.raises(OptionError, match=f"`damping`: expected 0 or more, .*, found {damping}"):
        build(tiny_model_folder, tmp_path / "index", damping=damping)
    with pytest.raises(OptionError, match=r"`damping`: applies to whitened coordinates, found 0.1"):
        build(tiny_model_folder, tmp_path / "index", damping=0.1, codec="float32")
    assert not computed
    assert not (tmp_path / "index").exists()


def test_what_another_attempt_left_is_not_taken_for_projected_rows(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A whitened attempt ends after its first pass; the folder is then used for projected rows."""
    out = tmp_path / "index"

    def refused(*_arguments: object, **_options: object) -> None:
        raise CurvatureError("R is singular")

    with monkeypatch.context() as patched:
        patched.setattr(FewExamples, "whitening", refused)
        patched.setattr(SquareAutocorrelation, "whitening", refused)
        with pytest.raises(CurvatureError, match="R is singular"):
            build(tiny_model_folder, out, codec="1-bit")
    assert (out / PART_FOLDER).exists()
    found = build(tiny_model_folder, out, codec="float32")
    expected = build(tiny_model_folder, tmp_path / "anew", codec="float32")
    for one, other in zip(found.shards, expected.shards, strict=True):
        assert torch.equal(one.stored.codes, other.stored.codes)
        assert torch.equal(one.losses, other.losses)
    assert not (out / PART_FOLDER).exists()


@pytest.mark.parametrize("empty", [False, True])
def test_a_finished_index_is_repaired_though_its_first_pass_was_half_removed(
    empty: bool, tiny_model_folder: Path, tmp_path: Path
):
    """Its removal was interrupted after the manifest; later a shard is damaged, and the first pass is needed again."""
    out = tmp_path / "index"
    expected = [shard.digest for shard in build(tiny_model_folder, out, codec="1-bit").shards]
    left = out / PART_FOLDER / "shards"
    left.mkdir(parents=True)
    if not empty:
        (left / "000000.safetensors").write_bytes(b"left")
    shard = out / "shards" / "000001.safetensors"
    shard.write_bytes(shard.read_bytes()[:100])
    repaired = build(tiny_model_folder, out, codec="1-bit")
    assert [shard.digest for shard in repaired.shards] == expected
    assert not (out / PART_FOLDER).exists()
