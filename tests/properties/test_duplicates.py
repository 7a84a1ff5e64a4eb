"""No two examples of an index share a name: a second record of a name is refused, or numbered."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capitals import QUERIES
from trackstar.attribution.streaming import stream_queries
from trackstar.cli import framework
from trackstar.cli import trackstar as command_group
from trackstar.corpus import Example, duplicates, open_corpus, read_names
from trackstar.corpus import sources as sources_module
from trackstar.editing.adding import add_examples
from trackstar.editing.merging import merge_indexes
from trackstar.editing.removing import remove_examples
from trackstar.errors import CorpusError, OptionError
from trackstar.indexing.build import build_index
from trackstar.store import Index

TWICE = [("a", "Paris is in France."), ("b", "Rome is in Italy."), ("a", "Berlin is in Germany.")]
NAMES = st.lists(st.sampled_from(["a", "b", "a~2", "a~3", "a#1", "a#2", "a~2#1", "a#1#2", "a#1~2", "#1"]), min_size=1)


def write_lines(folder: Path, records: list[tuple[str, str]] = TWICE) -> Path:
    path = folder / "c.jsonl"
    path.write_text("".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in records))
    return path


def _parquet(folder: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names, texts = zip(*TWICE, strict=True)
    pq.write_table(pa.table({"id": list(names), "text": list(texts)}), folder / "c.parquet")
    return folder / "c.parquet"


def _dataset(folder: Path) -> Path:
    import datasets

    names, texts = zip(*TWICE, strict=True)
    datasets.Dataset.from_dict({"id": list(names), "text": list(texts)}).save_to_disk(folder / "saved")
    return folder / "saved"


def build(folder: Path, data: object, out: Path, **options: Any) -> Index:
    settings = {"layer_blocks": 1, "side": 4, "second_moment": "none", "codec": "float16", "progress": False}
    return build_index(str(folder), data, out, **{**settings, **options})


def names_of(index: Index) -> list[str]:
    return [stored.example.example_id for stored in index.examples()]


def surveyed(names: list[str], **options: Any) -> list[str]:
    """The examples' names after a survey."""
    corpus = open_corpus([Example(example_id=name, text=name, record=0) for name in names], **options)
    corpus.survey()
    return [example.example_id for example in corpus.examples()]


def collides(names: list[str]) -> bool:
    """Whether two of the names are equal, or one is that of a window of another: the slow, obvious test."""
    return len(set(names)) < len(names) or any(
        re.fullmatch(re.escape(a) + r"#[1-9]\d*", b) for a in names for b in names
    )


# ---- In one corpus -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "places"),
    [
        (write_lines, ("{}:3: ", "{}:1;")),
        (_parquet, ("{}: row 2: ", "{}: row 0;")),
        (_dataset, ("{}: record 2: ", "{}: record 0;")),
    ],
    ids=["lines", "parquet", "dataset"],
)
def test_second_record_of_a_name_is_refused_with_both_places(
    make: Callable[[Path], Path], places: tuple[str, str], tmp_path: Path
):
    path = make(tmp_path)
    here, there = (place.format(path) for place in places)
    with pytest.raises(CorpusError) as caught:
        open_corpus(path).survey()
    message = str(caught.value)
    assert message.startswith(f'{here}the name "a" is also at {there}')
    assert message.endswith('name each once, name another field with `id_field`, or pass `duplicate_ids="number"`')
    numbered = open_corpus(path, duplicate_ids="number")
    assert [example.example_id for example in numbered.examples()] == ["a", "b", "a~2"]
    assert [example.example_id for example in numbered.examples(start=2)] == ["a~2"]
    assert [example.example_id for example in open_corpus(path, limit=2).examples()] == ["a", "b"]
    open_corpus(path, limit=2).survey()


@given(NAMES)
def test_names_are_refused_exactly_if_two_examples_would_share_one(names: list[str]):
    if collides(names):
        with pytest.raises(CorpusError, match=r"is also at|is that of a window of"):
            surveyed(names)
    else:
        assert surveyed(names) == names


@given(NAMES)
def test_numbered_names_never_collide_and_change_only_where_needed(names: list[str]):
    found = surveyed(names, duplicate_ids="number")
    assert not collides(found)
    assert all(
        new == old or re.fullmatch(re.escape(old) + r"~[1-9]\d*", new) for old, new in zip(names, found, strict=True)
    )
    first = {name: names.index(name) for name in names}
    for name, place in first.items():
        window = re.fullmatch(r"(.+)#[1-9]\d*", name)
        assert (found[place] == name) == (window is None or window[1] not in first)


@given(NAMES, st.integers(0, 2))
def test_equal_hashes_of_different_names_are_no_duplicates(names: list[str], bits: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "hash_of", lambda text: sum(text.encode()) % 2**bits)
        if collides(names):
            with pytest.raises(CorpusError, match=r"is also at|is that of a window of"):
                surveyed(names)
        else:
            assert surveyed(names) == names


def test_default_leaves_the_digest_as_it_was_and_numbering_is_part_of_it(tmp_path: Path):
    path = write_lines(tmp_path)
    plain, numbered = open_corpus(path), open_corpus(path, duplicate_ids="number")
    assert plain.digest() == "3f05d53e50c114c5304af98d2baec8c4"
    assert plain.digest() != numbered.digest() == numbered.survey().digest
    assert plain.choice_of_digest(plain.digest()) == "refuse"
    assert plain.choice_of_digest(numbered.digest()) == "number"
    assert plain.choice_of_digest("0" * 32) is None


def test_survey_reads_lines_once_and_digests_every_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import gzip

    path = tmp_path / "c.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(b'{"id": %d, "text": "t"}\n' % number for number in range(5000))))
    opened: list[str] = []
    real = sources_module.open_raw
    for limit in (None, 3):
        corpus = open_corpus(path, limit=limit)
        digest = corpus.digest()
        with monkeypatch.context() as patch:
            patch.setattr(sources_module, "open_raw", lambda file: (opened.append(file.name), real(file))[1])
            survey = corpus.survey()
        assert (survey.digest, survey.records) == (digest, limit or 5000)
    assert len(opened) == 2  # once for each survey


def test_repeated_and_blank_texts_are_counted_and_told():
    survey = open_corpus(["one", "two", "one", "", "", " \n", "one"]).survey()
    assert (survey.repeated_texts, survey.blank_texts) == (2, 1)
    assert list(survey.notes("c")) == [
        "c: the texts of 1 of 7 records are nothing but white space",
        "c: the texts of 2 of 7 records repeat an earlier record's; each is indexed and ranked by itself",
    ]
    assert not list(open_corpus(["one", "two"]).survey().notes("c"))


# ---- Names files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [" a", "a ", "a\nb", "a\r", "\t", " ", "a\u2028b", "a\x0bb", "\ufeffa", "a\x85"])
def test_name_that_no_line_of_a_file_can_hold_is_refused(name: str, tmp_path: Path):
    path = write_lines(tmp_path, [("good", "x"), (name, "y")])
    with pytest.raises(CorpusError, match=rf'^{re.escape(str(path))}:2: field "id" (is blank|holds a line break)'):
        open_corpus(path).survey()
    with pytest.raises(CorpusError, match=r"^record 0: the id (is blank|holds a line break)"):
        list(open_corpus([Example(example_id=name, text="x", record=0)]).examples())


@given(st.lists(st.text(min_size=1), min_size=1, unique=True))
def test_names_that_a_corpus_may_have_survive_a_names_file(names: list[str]):
    good = []
    for name in names:
        try:
            list(open_corpus([Example(example_id=name, text="x", record=0)]).examples())
        except CorpusError:
            continue
        good.append(name)
    if good:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "names.txt"
            path.write_bytes("\n".join(good).encode())
            assert read_names(path) == good


# ---- Everything that makes or grows an index -----------------------------------------------------------------------


def test_every_way_to_read_a_corpus_for_gradients_refuses_duplicates(tiny_model_folder: Path, tmp_path: Path):
    path = write_lines(tmp_path)
    expected = rf'^{re.escape(str(path))}:3: the name "a" is also at'
    index = build(tiny_model_folder, ["Gold is Au."], tmp_path / "index")
    ways: dict[str, Callable[[], object]] = {
        "index": lambda: build(tiny_model_folder, path, tmp_path / "new"),
        "whitened": lambda: build(tiny_model_folder, path, tmp_path / "new", coordinates="whitened"),
        "array task": lambda: build(tiny_model_folder, path, tmp_path / "new", share="2/2"),
        "add": lambda: add_examples(index, path, tmp_path / "new", progress=False),
        "stream": lambda: stream_queries(
            str(tiny_model_folder), path, QUERIES[:1], side=4, second_moment="none", progress=False
        ),
    }
    for way in ways.values():
        with pytest.raises(CorpusError, match=expected):
            way()
    shards = build(tiny_model_folder, path, tmp_path / "numbered", duplicate_ids="number", shard_examples=1)
    assert names_of(shards) == ["a", "b", "a~2"]
    for task in ("2/2", "1/2"):
        options: dict[str, Any] = {"share": task, "duplicate_ids": "number", "shard_examples": 1}
        tasks = build(tiny_model_folder, path, tmp_path / "tasks", **options)
    assert names_of(tasks) == ["a", "b", "a~2"]
    report = stream_queries(
        str(tiny_model_folder), path, QUERIES[:1], side=4, second_moment="none", duplicate_ids="number", progress=False
    )
    assert {ranked.example_id for ranked in report.results[0].proponents} == {"a", "b", "a~2"}


def test_add_refuses_or_numbers_names_that_the_index_has(tiny_model_folder: Path, tmp_path: Path):
    first = write_lines(tmp_path, [("a", "Paris is in France."), ("b#1", "Rome is in Italy.")])
    index = build(tiny_model_folder, first, tmp_path / "index")
    (tmp_path / "more").mkdir()
    for name, reason in (
        ("a", "is already in"),
        ("b", 'is already in .* as "b#1"'),
        ("a#2", 'is already in .* as "a"'),
    ):
        more = write_lines(tmp_path / "more", [("z", "Gold is Au."), (name, "Berlin is in Germany.")])
        with pytest.raises(CorpusError, match=rf'^{re.escape(str(more))}:2: the name "{name}" {reason}'):
            add_examples(index, more, tmp_path / "grown", progress=False)
        out = tmp_path / f"grown-{name}"
        grown = add_examples(index, more, out, duplicate_ids="number", progress=False)
        assert names_of(grown) == ["a", "b#1", "z", f"{name}~2"]
        assert names_of(add_examples(index, more, out, duplicate_ids="number", progress=False)) == names_of(grown)
    with pytest.raises(OptionError, match="already contains"):
        add_examples(index, first, tmp_path / "twice", duplicate_ids="number", progress=False)
    removed = remove_examples(grown, ["a#2~2"], tmp_path / "removed", progress=False)
    assert names_of(removed) == ["a", "b#1", "z"]


def test_records_without_names_are_named_after_their_place_in_the_index(tiny_model_folder: Path, tmp_path: Path):
    index = build(tiny_model_folder, ["Paris is in France.", "Rome is in Italy."], tmp_path / "index")
    grown = add_examples(index, ["Gold is Au."], tmp_path / "grown", progress=False)
    assert names_of(grown) == ["example:0", "example:1", "example:2"]


def test_merge_refuses_or_renames_documents_of_one_name(tiny_model_folder: Path, tmp_path: Path):
    long = "The river Danube flows through Vienna, Budapest and Belgrade."
    one = build(tiny_model_folder, [{"id": "a", "text": long}], tmp_path / "one", window_tokens=12)
    two = build(tiny_model_folder, [{"id": "a", "text": long + " So."}], tmp_path / "two", window_tokens=12)
    assert one.rows > 1
    with pytest.raises(CorpusError, match=r'two, row 0: the name "a" is also at .*one, row 0; remove one of them with'):
        merge_indexes([one, two], tmp_path / "merged", progress=False)
    merged = merge_indexes([one, two], tmp_path / "merged", duplicate_ids="number", progress=False)
    assert names_of(merged) == [*names_of(one), *(name.replace("a", "a~2") for name in names_of(two))]
    assert {stored.example.parent_id for stored in merged.examples()} == {"a", "a~2"}
    # Windows of one document that lie in two indexes are one document.
    first, *others = names_of(one)
    assert remove_examples(one, others, tmp_path / "head", progress=False).rows == 1
    head = Index.open(tmp_path / "head")
    assert names_of(merge_indexes([head, two], tmp_path / "again", duplicate_ids="number", progress=False))[0] == first


def test_command_line_numbers_duplicates(tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = write_lines(tmp_path)
    command = f"index --model {tiny_model_folder} --data {path} --out {tmp_path / 'index'} --side 4 --codec float16"
    words = [*command.split(), "--layer-blocks", "1", "--second-moment", "none"]
    assert framework.run(command_group, words) == 1
    notes = capsys.readouterr().err
    assert re.sub(r"^device: .*\n", "", notes) == (
        f'trackstar: {path}:3: the name "a" is also at {path}:1; name each once, name another field with --id-field, '
        "or pass --duplicate-ids number\n"
    )
    assert framework.run(command_group, [*words, "--duplicate-ids", "number"]) == 0
    assert f"{path}: 1 records have a name that is taken, and are named NAME~2, NAME~3, ..." in capsys.readouterr().err
    assert names_of(Index.open(tmp_path / "index")) == ["a", "b", "a~2"]
