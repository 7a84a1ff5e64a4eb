"""Indexes that are extended, reduced, merged and converted equal those built from the corpus."""

import dataclasses
from pathlib import Path

import pytest
import torch

from capitals import QUERIES, TEXTS
from trackstar.attribution.answering import answer_queries
from trackstar.choices import CODECS, CodecName
from trackstar.corpus import TokenizedExample
from trackstar.curvature.task import train_autocorrelation
from trackstar.curvature.train_autocorrelation import FewExamples, SquareAutocorrelation
from trackstar.editing import rewriting
from trackstar.editing.adding import add_examples
from trackstar.editing.converting import convert_index
from trackstar.editing.merging import merge_indexes
from trackstar.editing.removing import remove_examples
from trackstar.errors import DamagedIndexError, IndexMismatchError, OptionError, check_choice
from trackstar.indexing.build import build_index
from trackstar.indexing.train_whitening import TrainWhitening
from trackstar.retrieval.scoring import Scorer
from trackstar.retrieval.top_candidates import top_candidates
from trackstar.store import Index, verify
from trackstar.workers import setups

FIRST, SECOND = TEXTS[:14], ["", *TEXTS[14:]]


def build(folder: Path, texts: list[str], out: Path, codec: CodecName = "float16", **options: object) -> Index:
    settings = {"layer_blocks": 2, "side": 8, "second_moment": "none", "shard_examples": 5, "progress": False}
    return build_index(str(folder), texts, out, codec=codec, **{**settings, **options})  # pyright: ignore[reportArgumentType]


def rows_of(index: Index) -> list[tuple[str, int, int, bytes]]:
    """Every example with its place in the corpora and the bytes of its codes."""
    codes = [row.numpy().tobytes() for shard in index.shards for row in shard.stored.codes.view(torch.uint8)]
    places = [(one.example.text, one.example.record, one.example.window) for one in index.examples()]
    return [(*place, code) for place, code in zip(places, codes, strict=True)]


def values(index: Index) -> torch.Tensor:
    return torch.cat([shard.stored.decode() for shard in index.shards])


def check_whole(index: Index) -> None:
    report = verify(index.path)
    assert report.ok, report.problems
    assert not [note for note in report.notes if "cached files" not in note]
    assert [shard.rows for shard in index.shards[:-1]] == [5] * (len(index.shards) - 1)


@pytest.fixture(scope="module")
def parts(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Index, Index, Index]:
    """Both parts of a corpus, and the whole corpus, indexed with the same settings."""
    folder = tmp_path_factory.mktemp("parts")
    made = zip(("first", "second", "all"), (FIRST, SECOND, [*FIRST, *SECOND]), strict=True)
    first, second, whole = (build(tiny_model_folder, texts, folder / name) for name, texts in made)
    return first, second, whole


def test_merged_indexes_are_the_index_of_both_corpora(parts: tuple[Index, Index, Index], tmp_path: Path):
    first, second, whole = parts
    # Both lists have an `example:1`.
    merged = merge_indexes([first.path, second], tmp_path / "merged", duplicate_ids="number", progress=False)
    check_whole(merged)
    found, expected = rows_of(merged), rows_of(whole)
    assert [row[:3] for row in found] == [row[:3] for row in expected]
    torch.testing.assert_close(values(merged), values(whole), rtol=1e-2, atol=1e-4)
    r, r_expected = (train_autocorrelation(index).square() for index in (merged, whole))
    torch.testing.assert_close(r, r_expected, rtol=1e-2, atol=1e-3 * float(r_expected.abs().max()))
    for completion in (merged.manifest.completion, whole.manifest.completion):
        assert completion is not None
        assert (completion.records, completion.skipped) == (len(FIRST) + len(SECOND), 1)
    assert [corpus.first_record for corpus in merged.manifest.corpora] == [0, len(FIRST)]
    report, expected_report = (answer_queries(index, QUERIES, k=5, progress=False) for index in (merged, whole))
    for one, other in zip(report.results, expected_report.results, strict=True):
        assert [ranked.text for ranked in one.proponents] == [ranked.text for ranked in other.proponents]


def test_removing_examples_leaves_the_others_unchanged(parts: tuple[Index, Index, Index], tmp_path: Path):
    whole = parts[2]
    names = [stored.example.example_id for stored in whole.examples()]
    gone = {names[0], names[6], names[7], names[-1]}
    left = remove_examples(whole, gone, tmp_path / "left", progress=False)
    check_whole(left)
    remaining = [row for row, name in zip(rows_of(whole), names, strict=True) if name not in gone]
    assert rows_of(left) == remaining
    phi = values(whole)[[row for row, name in enumerate(names) if name not in gone]].reshape(len(remaining), -1, 64)
    expected = torch.einsum("nbi,nbj->bij", phi, phi) / len(phi)
    found = train_autocorrelation(left).square()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert left.manifest.identity_digest() != whole.manifest.identity_digest()
    again = remove_examples(left, [names[1]], tmp_path / "again", progress=False)
    assert again.manifest.removed not in (None, left.manifest.removed)


@pytest.mark.parametrize(
    ("names", "expected"),
    [(["nothing of the kind"], "found 1 other names, such as 'nothing of"), ([], "found no name")],
)
def test_unknown_names_are_refused(names: list[str], expected: str, parts: tuple[Index, Index, Index], tmp_path: Path):
    with pytest.raises(OptionError, match=expected):
        remove_examples(parts[0], names, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    everything = [stored.example.example_id for stored in parts[0].examples()]
    with pytest.raises(OptionError, match=r"all 14 examples of .* would be removed"):
        remove_examples(parts[0], everything, tmp_path / "out", progress=False)


@pytest.mark.parametrize("codec", ["int8", "4-bit", "2-bit", "1-bit"])
def test_a_converted_index_is_the_one_built_with_the_codec(
    codec: CodecName, parts: tuple[Index, Index, Index], tiny_model_folder: Path, tmp_path: Path
):
    """Except for rounding to float16 before conversion, which changes a few codes."""
    converted = convert_index(parts[2], tmp_path / "converted", codec=codec, progress=False)
    check_whole(converted)
    made = build(tiny_model_folder, [*FIRST, *SECOND], tmp_path / "made", codec)
    assert converted.manifest.coordinates == made.manifest.coordinates == "whitened"
    found, expected = values(converted), values(made)
    cosines = torch.nn.functional.cosine_similarity(found, expected, dim=1)
    assert float(cosines.min()) > 0.99
    again = convert_index(converted, tmp_path / "again", codec="1-bit", progress=False)
    check_whole(again)
    assert again.manifest.whitening == converted.manifest.whitening
    one, other = (
        answer_queries(index, QUERIES, k=5, exact=True, mixing=0.4, progress=False) for index in (converted, again)
    )
    for a, b in zip(one.results, other.results, strict=True):
        assert [ranked.row for ranked in a.proponents] == [ranked.row for ranked in b.proponents]


def test_converting_to_more_bits_is_refused(parts: tuple[Index, Index, Index], tmp_path: Path):
    small = convert_index(parts[0], tmp_path / "small", codec="1-bit", progress=False)
    with pytest.raises(
        OptionError, match=r"`codec`: expected no more bits than 1-bit, the codec of .*small, found 4-bit"
    ):
        convert_index(small, tmp_path / "large", codec="4-bit", progress=False)
    with pytest.raises(OptionError, match=r"`damping`: found 0.1, but .*small is whitened already"):
        convert_index(small, tmp_path / "damped", codec="1-bit", damping=0.1, progress=False)
    with pytest.raises(OptionError, match=r"`codec`: expected one of .*, found 3-bit"):
        check_choice("codec", "3-bit", CODECS)


def test_indexes_with_different_settings_are_not_merged(
    parts: tuple[Index, Index, Index], tiny_model_folder: Path, tmp_path: Path
):
    other = build(tiny_model_folder, SECOND, tmp_path / "other", seed=1)
    with pytest.raises(IndexMismatchError, match=r"other: projection.seed is 1, but 0 in .*; only indexes"):
        merge_indexes([parts[0], other], tmp_path / "out", progress=False)
    small = [convert_index(part, tmp_path / name, codec="1-bit", progress=False) for part, name in zip(parts, "ab")]  # noqa: B905
    with pytest.raises(IndexMismatchError, match=r"whitening.d"):
        merge_indexes(small, tmp_path / "out", progress=False)
    with pytest.raises(OptionError, match="`indexes`: expected two or more, found 1"):
        merge_indexes([parts[0]], tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("codec", ["float16", "1-bit"])
def test_adding_computes_gradients_of_new_examples_only(
    codec: CodecName, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    first = build(tiny_model_folder, FIRST, tmp_path / "first", codec)
    computed: list[str] = []
    original = setups.projector_of

    def watched(*arguments: object, **options: object):
        made = original(*arguments, **options)  # pyright: ignore[reportArgumentType]
        batches = made.batches

        def noted(examples: list[TokenizedExample]):
            computed.extend(example.text for example in examples)
            return batches(examples)

        made.batches = noted  # pyright: ignore[reportAttributeAccessIssue]
        return made

    monkeypatch.setattr(setups, "projector_of", watched)
    grown = add_examples(first, SECOND, tmp_path / "grown", progress=False)
    check_whole(grown)
    assert computed == SECOND[1:]
    assert [row[0] for row in rows_of(grown)] == [*FIRST, *SECOND[1:]]
    assert rows_of(grown)[: len(FIRST)] == rows_of(first)
    assert first.rows == len(FIRST)
    assert grown.manifest.whitening == first.manifest.whitening
    # A finished index is opened without computation; another corpus is refused.
    again = add_examples(tmp_path / "first", SECOND, tmp_path / "grown", progress=False)
    assert again.manifest == grown.manifest
    assert len(computed) == len(SECOND) - 1
    with pytest.raises(IndexMismatchError, match=r"grown: the existing index has corpora\[1\]\.digest"):
        add_examples(first, TEXTS[:3], tmp_path / "grown", progress=False)
    with pytest.raises(OptionError, match=r"already contains .*, whose examples would count twice"):
        add_examples(grown, SECOND, tmp_path / "twice", progress=False)
    assert not (tmp_path / "twice").exists()
    with pytest.raises(OptionError, match="is the index itself or lies in it"):
        add_examples(first, SECOND, tmp_path / "first", progress=False)
    report = answer_queries(grown, QUERIES[:2], k=len(TEXTS), exact=True, progress=False)
    assert {ranked.text for ranked in report.results[0].proponents} == set(TEXTS)


def test_every_edit_resumes_after_an_interruption(
    parts: tuple[Index, Index, Index], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Runs stopped after each shard in turn write the same bytes as one uninterrupted run."""
    first, second, whole = parts
    names = [stored.example.example_id for stored in whole.examples()][3:9]
    ways = {
        "merged": lambda out: merge_indexes([first, second], out, duplicate_ids="number", progress=False),
        "removed": lambda out: remove_examples(whole, names, out, progress=False),
        "converted": lambda out: convert_index(whole, out, codec="1-bit", progress=False),
        "added": lambda out: add_examples(first, SECOND, out, progress=False),
    }
    original = rewriting.IndexWriter.write_shard
    for name, way in ways.items():
        expected = way(tmp_path / name)
        left = -1

        def stopping(self: rewriting.IndexWriter, content: object) -> object:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return original(self, content)  # pyright: ignore[reportArgumentType]

        out = tmp_path / f"{name} interrupted"
        runs = 0
        while runs < 12:
            runs += 1
            left = 1
            with monkeypatch.context() as patch:
                patch.setattr(rewriting.IndexWriter, "write_shard", stopping)
                try:
                    way(out)
                except KeyboardInterrupt:
                    continue
                break
        assert 2 < runs < 12
        found = Index.open(out)
        assert found.manifest.to_json() == expected.manifest.to_json()
        assert [shard.digest for shard in found.shards] == [shard.digest for shard in expected.shards]
        assert not (out / "part").exists()


@pytest.mark.parametrize("other", ["removed", "converted"])
def test_a_folder_extended_from_another_index_is_refused(other: str, parts: tuple[Index, Index, Index], tmp_path: Path):
    first = parts[0]
    name = first.example(2).example.example_id
    made = (
        remove_examples(first, [name], tmp_path / other, progress=False)
        if other == "removed"
        else convert_index(first, tmp_path / other, codec="1-bit", progress=False)
    )
    add_examples(first, SECOND, tmp_path / "grown", progress=False)
    with pytest.raises(IndexMismatchError, match=r"grown: the existing index has (removed|`coordinates`)"):
        add_examples(made, SECOND, tmp_path / "grown", progress=False)


def test_an_extended_index_killed_late_or_damaged_is_completed(
    parts: tuple[Index, Index, Index], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    grown = add_examples(parts[0], SECOND, tmp_path / "grown", progress=False)
    before = [shard.digest for shard in grown.shards]

    def killed(_folder: Path) -> None:
        raise KeyboardInterrupt

    # Killed after the manifest is marked as finished, before the part's folder is removed.
    with monkeypatch.context() as patch:
        patch.setattr("trackstar.store.writer.remove_folder", killed)
        with pytest.raises(KeyboardInterrupt):
            add_examples(parts[0], SECOND, tmp_path / "late", progress=False)
    assert (tmp_path / "late" / "part").exists()
    late = add_examples(parts[0], SECOND, tmp_path / "late", progress=False)
    assert not (tmp_path / "late" / "part").exists()
    assert [shard.digest for shard in late.shards] == before
    grown.shards[-1].path.unlink()
    whole = add_examples(parts[0], SECOND, tmp_path / "grown", progress=False)
    check_whole(whole)
    assert [shard.digest for shard in whole.shards] == before
    assert not (tmp_path / "grown" / "part").exists()


def test_an_example_is_not_merged_with_itself(parts: tuple[Index, Index, Index], tmp_path: Path):
    first, second, whole = parts
    names = [stored.example.example_id for stored in whole.examples()]
    with pytest.raises(OptionError, match=r"first and .*first share 14 examples \(corpus"):
        merge_indexes([first, second, first], tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    # Two halves of one corpus have no example in common, until one of them has too many.
    halves = [
        remove_examples(whole, gone, tmp_path / name, progress=False)
        for name, gone in (("head", names[9:]), ("tail", names[:9]), ("much", names[:8]))
    ]
    merged = merge_indexes(halves[:2], tmp_path / "merged", progress=False)
    assert [row[0] for row in rows_of(merged)] == [row[0] for row in rows_of(whole)]
    with pytest.raises(OptionError, match=r"much and .* share 1 examples"):
        merge_indexes([halves[0], halves[2]], tmp_path / "out", progress=False)


def test_a_corpus_read_with_another_limit_is_detected(
    parts: tuple[Index, Index, Index], tiny_model_folder: Path, tmp_path: Path
):
    """Its digest differs, but its first examples are the same."""
    first, second, _whole = parts
    some = build(tiny_model_folder, FIRST, tmp_path / "some", limit=6)
    with pytest.raises(OptionError, match=r"already contains .*, whose examples would count twice"):
        add_examples(some, FIRST, tmp_path / "out", progress=False)
    with pytest.raises(OptionError, match=r"already contains .*, whose examples would count twice"):
        add_examples(first, FIRST, tmp_path / "out", limit=6, progress=False)
    with pytest.raises(OptionError, match=r"some and .*first share 6 or more examples"):
        merge_indexes([first, some], tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    # Lists have the same source; the examples of another list differ at the same numbers.
    merged = merge_indexes([some, second], tmp_path / "merged", duplicate_ids="number", progress=False)
    assert merged.rows == 6 + second.rows
    assert add_examples(some, SECOND, tmp_path / "added", progress=False).rows == merged.rows


def test_norms_are_unchanged_by_conversions(tiny_model_folder: Path, tmp_path: Path):
    """They are those of the rows before their first encoding."""
    int8 = build(tiny_model_folder, TEXTS, tmp_path / "int8", codec="int8")
    norms = torch.cat([shard.stored.norms for shard in int8.shards])
    index = int8
    for codec in ("4-bit", "2-bit", "2-bit", "1-bit"):
        before = [row[-1] for row in rows_of(index)]
        same = index.manifest.codec == codec
        index = convert_index(index, tmp_path / f"{index.path.name}-{codec}", codec=codec, progress=False)
        assert torch.equal(torch.cat([shard.stored.norms for shard in index.shards]), norms)
        assert not same or [row[-1] for row in rows_of(index)] == before


def test_excessive_damping_is_refused_in_converting(parts: tuple[Index, Index, Index], tmp_path: Path):
    for damping, message in ((float("inf"), "expected 0 or more"), (1e300, "nothing is left of R")):
        with pytest.raises(OptionError, match=message):
            convert_index(parts[2], tmp_path / "out", codec="1-bit", damping=damping, progress=False)


def test_an_interrupted_conversion_resumes_with_its_saved_whitening(
    parts: tuple[Index, Index, Index], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Recomputed factors could differ in their last bit, so that earlier shards would not fit."""
    original = rewriting.IndexWriter.write_shard
    written = 0

    def stopping(self: rewriting.IndexWriter, content: object) -> object:
        nonlocal written
        written += 1
        if written > 2:
            raise KeyboardInterrupt
        return original(self, content)  # pyright: ignore[reportArgumentType]

    with monkeypatch.context() as patch:
        patch.setattr(rewriting.IndexWriter, "write_shard", stopping)
        with pytest.raises(KeyboardInterrupt):
            convert_index(parts[2], tmp_path / "out", codec="4-bit", progress=False)

    def again(*_arguments: object, **_options: object) -> None:
        raise AssertionError("R_train is factorised again")

    with monkeypatch.context() as patch:
        for form in (FewExamples, SquareAutocorrelation):
            patch.setattr(form, "whitening", again)
        found = convert_index(parts[2], tmp_path / "out", codec="4-bit", progress=False)
    expected = convert_index(parts[2], tmp_path / "undisturbed", codec="4-bit", progress=False)
    assert [shard.digest for shard in found.shards] == [shard.digest for shard in expected.shards]


def test_damping_can_be_passed_to_convert_index(parts: tuple[Index, Index, Index], tmp_path: Path):
    converted = convert_index(parts[0], tmp_path / "out", codec="int8", damping=0.7, progress=False)
    assert converted.manifest.whitening is not None
    assert converted.manifest.whitening.damping == 0.7
    expected = TrainWhitening.of_index(parts[0], damping=0.7, source="x")
    assert converted.manifest.whitening.digest == expected.entry.digest
    assert dataclasses.asdict(expected.entry)["source"] == "x"


@pytest.mark.parametrize("inside", ["", "sub"])
def test_no_index_is_written_over_or_into_its_source(parts: tuple[Index, Index, Index], inside: str):
    first, second, _ = parts
    out = first.path / inside
    before = sorted(first.path.rglob("*"))
    for make in (
        lambda: convert_index(first, out, codec="float16", progress=False),
        lambda: merge_indexes([first, second], out, progress=False),
        lambda: remove_examples(first, [first.example(0).example.example_id], out, progress=False),
    ):
        with pytest.raises(OptionError, match="is the index itself or lies in it"):
            make()
    assert sorted(first.path.rglob("*")) == before


def test_a_damaged_number_raises_and_is_not_ranked(parts: tuple[Index, Index, Index], monkeypatch: pytest.MonkeyPatch):
    index = Index.open(parts[0].path)
    found = index.shards[0].stored.codes.clone()
    found[0, 0] = float("nan")
    monkeypatch.setattr(Index, "_codes", lambda _index, shard, _rows: iter([(found[: shard.rows], None)]))
    for queries in (1, 8):
        scorer = Scorer(vectors=torch.ones(queries, index.dimensions), multipliers=torch.ones(index.rows))
        with pytest.raises(
            DamagedIndexError, match="expected finite scores, found NaN or infinity for row 0; `verify`"
        ):
            top_candidates(index, scorer, 2)
