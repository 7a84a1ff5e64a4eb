"""A corpus's examples do not depend on its storage; its digest depends on every byte; its sample is uniform."""

import dataclasses
import gzip
import itertools
import json
import lzma
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pandas as pd
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from trackstar.corpus import Corpus, Example, open_corpus, read_queries
from trackstar.corpus.data_files import find_files
from trackstar.corpus.sources import FileSource
from trackstar.corpus.tables import TableSource
from trackstar.errors import CorpusError

TEXTS = ["Paris is in France.", "", " spaces kept ", "Zürich 漢字 🙂", 'quotes " and \\', "two\nlines", "nul \0", "z"]
RECORDS = [{"id": f"r{n}", "text": text, "n": n} for n, text in enumerate(TEXTS)]
EXPECTED = [
    Example(example_id=r["id"], text=r["text"], record=n, metadata=f'{{"n":{n}}}') for n, r in enumerate(RECORDS)
]


def _json_lines(records: list[dict[str, Any]] = RECORDS) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def _jsonl(folder: Path) -> Path:
    (folder / "c.jsonl").write_bytes(_json_lines())
    return folder / "c.jsonl"


def _jsonl_of_windows(folder: Path) -> Path:
    """Byte order mark, CR LF, blank lines, no last line end."""
    lines = _json_lines().replace(b"\n", b"\r\n").replace(b'\r\n{"id": "r3"', b'\r\n \r\n\r\n{"id": "r3"')
    (folder / "c.json").write_bytes(b"\xef\xbb\xbf" + lines.removesuffix(b"\r\n"))
    return folder / "c.json"


def _gzipped(folder: Path) -> Path:
    half = len(_json_lines()) // 2
    members = gzip.compress(_json_lines()[:half]) + gzip.compress(_json_lines()[half:])
    (folder / "c.jsonl.gz").write_bytes(members)
    return folder / "c.jsonl.gz"


def _zstandard(folder: Path) -> Path:
    half = len(_json_lines()) // 2
    frames = zstandard.compress(_json_lines()[:half]) + zstandard.compress(_json_lines()[half:])
    (folder / "c.ndjson.zst").write_bytes(frames)
    return folder / "c.ndjson.zst"


def _parquet(folder: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(RECORDS), folder / "c.parquet", row_group_size=3)
    return folder / "c.parquet"


def _saved_dataset(folder: Path) -> Path:
    import datasets

    datasets.Dataset.from_list(RECORDS).save_to_disk(folder / "saved")
    return folder / "saved"


def _folder(folder: Path) -> Path:
    """Files at two depths, one named like the release's shards, and files that are not read."""
    (folder / "b").mkdir()
    (folder / "a.jsonl-00000-of-00002").write_bytes(_json_lines(RECORDS[:3]))
    (folder / "b" / "c.jsonl.gz").write_bytes(gzip.compress(_json_lines(RECORDS[3:])))
    for other in ("README.md", ".hidden.txt", "_SUCCESS"):
        (folder / other).write_bytes(b"no corpus")
    return folder


def _folder_of_parquet(folder: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name, rows in (("train-0", RECORDS[:0]), ("train-1", RECORDS[:5]), ("train-2", RECORDS[5:])):
        pq.write_table(pa.Table.from_pylist(rows, pa.Table.from_pylist(RECORDS).schema), folder / f"{name}.parquet")
    return folder


def _glob(folder: Path) -> Path:
    (folder / "x1.jsonl").write_bytes(_json_lines(RECORDS[:2]))
    (folder / "x2.jsonl.zst").write_bytes(zstandard.compress(_json_lines(RECORDS[2:])))
    (folder / "y.jsonl").write_bytes(_json_lines())
    return folder / "x*.jsonl*"


def _url(_: Path) -> str:
    with fsspec.open("memory://corpora/c.jsonl.gz", "wb") as stream:
        stream.write(gzip.compress(_json_lines()))  # pyright: ignore[reportAttributeAccessIssue]
    return "memory://corpora/c.jsonl.gz"


def _dataset(_: Path) -> object:
    import datasets

    return datasets.Dataset.from_list(RECORDS)


def _reordered_dataset(_: Path) -> object:
    import datasets

    return datasets.Dataset.from_list(RECORDS[::-1]).select(range(len(RECORDS) - 1, -1, -1))


def _array(folder: Path) -> Path:
    """A JSON array over several lines, behind a byte order mark."""
    (folder / "c.json").write_bytes(b"\xef\xbb\xbf \n" + json.dumps(RECORDS, indent=1).encode() + b"\n")
    return folder / "c.json"


def _array_on_one_line(folder: Path) -> Path:
    (folder / "c.json.gz").write_bytes(gzip.compress(json.dumps(RECORDS, ensure_ascii=False).encode()))
    return folder / "c.json.gz"


def _xz(folder: Path) -> Path:
    half = len(_json_lines()) // 2
    (folder / "c.jsonl.xz").write_bytes(lzma.compress(_json_lines()[:half]) + lzma.compress(_json_lines()[half:]))
    return folder / "c.jsonl.xz"


def _arrow_file(folder: Path) -> Path:
    import pyarrow as pa
    import pyarrow.ipc as ipc

    table = pa.Table.from_pylist(RECORDS)
    with ipc.new_file(str(folder / "c.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return folder / "c.arrow"


def _arrow_stream(folder: Path) -> Path:
    import pyarrow as pa
    import pyarrow.ipc as ipc

    table = pa.Table.from_pylist(RECORDS)
    with ipc.new_stream(str(folder / "c.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return folder / "c.arrow"


def _iterable_dataset(folder: Path) -> object:
    import datasets

    return datasets.load_dataset("json", data_files=str(_jsonl(folder)), split="train", streaming=True)


def _generator_function(_: Path) -> object:
    return lambda: iter(RECORDS)


def _pandas(_: Path) -> object:
    import pandas

    return pandas.DataFrame(RECORDS, index=range(5, 5 + len(RECORDS)))


def _polars(_: Path) -> object:
    import polars

    return polars.DataFrame(RECORDS)


def _arrow_table(_: Path) -> object:
    import pyarrow as pa

    return pa.Table.from_pylist(RECORDS)


STORED: list[Callable[[Path], object]] = [
    _jsonl,
    _jsonl_of_windows,
    _gzipped,
    _zstandard,
    _parquet,
    _saved_dataset,
    _folder,
    _folder_of_parquet,
    _glob,
    _url,
    _dataset,
    _reordered_dataset,
    _array,
    _array_on_one_line,
    _xz,
    _arrow_file,
    _arrow_stream,
    _iterable_dataset,
    _generator_function,
    _pandas,
    _polars,
    _arrow_table,
    lambda _: RECORDS,
    lambda _: tuple(EXPECTED),
]


@pytest.fixture(params=STORED, ids=lambda build: build.__name__.strip("_<>"))
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> object:
    """The same records in one of the storage formats."""
    return request.param(tmp_path)


def test_examples_do_not_depend_on_how_they_are_stored(stored: object) -> None:
    assert list(open_corpus(stored).examples()) == EXPECTED


def test_reading_from_record_k_equals_skipping_k(stored: object) -> None:
    corpus = open_corpus(stored)
    for start in range(len(EXPECTED) + 2):
        assert list(corpus.examples(start)) == EXPECTED[start:]


def test_metadata_does_not_depend_on_how_records_are_stored(stored: object) -> None:
    corpus = open_corpus(stored, limit=5)
    bare = isinstance(stored, tuple)  # of `Example`s, which have no further fields
    assert corpus.metadata_fields == (() if bare else ("n",))
    assert list(corpus.metadata()) == ([{}] * 5 if bare else [{"n": str(n)} for n in range(5)])


def test_metadata_is_short_text_and_leaves_out_what_is_null() -> None:
    record = {"id": "a", "text": "t", "source": "x" * 500, "tags": ["é", 1], "year": None}
    assert list(open_corpus([record]).metadata()) == [{"source": "x" * 200, "tags": '["é", 1]'}]


@pytest.mark.parametrize(("name", "separator"), [("c.csv", ","), ("c.tsv.xz", "\t")])
def test_separated_values_are_records_of_text(name: str, separator: str, tmp_path: Path) -> None:
    """A header, quoted separators, quotes and line ends, and a blank line; every value is text."""
    rows = [["id", "text", "n"]] + [[r["id"], r["text"], str(r["n"])] for r in RECORDS if "\0" not in r["text"]]
    quoted = [separator.join('"' + value.replace('"', '""') + '"' for value in row) for row in rows]
    content = "\r\n".join([*quoted[:3], "", *quoted[3:]]).encode()
    (tmp_path / name).write_bytes(lzma.compress(content) if name.endswith("xz") else content)
    corpus = open_corpus(tmp_path / name)
    expected = [r for r in RECORDS if "\0" not in r["text"]]
    found = list(corpus.examples())
    assert [(e.example_id, e.text, e.metadata) for e in found] == [
        (r["id"], r["text"], f'{{"n":"{r["n"]}"}}') for r in expected
    ]
    assert corpus.count() == len(expected)
    assert list(corpus.examples(3)) == found[3:]


def test_an_iterator_is_read_once_and_gives_its_records_again() -> None:
    taken: list[int] = []

    def records() -> Iterator[dict[str, Any]]:
        for number, record in enumerate(RECORDS):
            taken.append(number)
            yield record

    corpus = open_corpus(records())
    assert list(corpus.examples()) == list(corpus.examples()) == EXPECTED
    assert corpus.count() == len(EXPECTED)
    assert taken == list(range(len(RECORDS)))


def test_a_function_whose_iterators_differ_is_noticed() -> None:
    once = iter(RECORDS)
    corpus = open_corpus(lambda: iter(RECORDS[: 3 + (next(once, None) is None)]))
    assert len(list(corpus.examples())) == 3
    for _ in range(len(RECORDS)):
        next(once, None)
    with pytest.raises(CorpusError, match="gave 4 records, expected 3 as stated or as the first time"):
        list(corpus.examples())


def test_a_function_whose_records_change_is_noticed_by_the_end_of_a_pass() -> None:
    version = ["a"]
    corpus = open_corpus(lambda: iter([{"text": "x"}, {"text": version[0]}]))
    assert [example.text for example in corpus.examples()] == ["x", "a"]
    version[0] = "b"
    with pytest.raises(CorpusError, match="gave other records than the first time; pass a list, or a function"):
        list(corpus.examples())
    same = open_corpus(lambda: iter([Example(example_id="a", text="x", record=0), {"id": 1, "text": "y", "n": {2}}]))
    assert list(same.examples()) == list(same.examples())


def test_a_limit_bounds_what_is_taken_of_an_iterator_without_end() -> None:
    def records() -> Iterator[dict[str, Any]]:
        return ({"id": number, "text": f"text {number}"} for number in itertools.count())

    for data in (records(), records, datasets.IterableDataset.from_generator(records)):
        corpus = open_corpus(data, limit=3)
        assert corpus.survey().records == corpus.count() == 3
        assert [example.text for example in corpus.examples()] == ["text 0", "text 1", "text 2"]
        assert corpus.digest() == open_corpus(records, limit=3).digest()
    iterator = records()
    open_corpus(iterator, limit=3).survey()
    assert next(iterator)["id"] == 3


def test_an_iterator_that_fails_names_the_record() -> None:
    def records() -> Iterator[dict[str, Any]]:
        yield from RECORDS[:2]
        raise RuntimeError("out of rows")

    for data in (records(), records):
        with pytest.raises(CorpusError, match=r"in memory: cannot be read from record 2 on \(RuntimeError: out of"):
            open_corpus(data).survey()


def test_the_names_of_a_frame_are_those_of_its_index_if_that_has_a_name() -> None:
    frame = pd.DataFrame(RECORDS)
    assert list(open_corpus(frame.set_index("id")).examples()) == list(open_corpus(frame).examples())
    kept = frame[["text"]][frame.index > 0]
    assert [each.metadata for each in open_corpus(kept).examples()] == [""] * (len(RECORDS) - 1)


def test_fields_that_no_record_has_are_noted() -> None:
    survey = open_corpus([{"text": "x"}, {"text": "y", "n": {"m": 1}}], metadata=["n.m", "datum", "typo"]).survey()
    assert next(survey.notes("c")) == "c: no record has a field datum, typo, which `metadata` names; check the spelling"
    assert not open_corpus([{"text": "x"}], metadata="all").survey().absent


def test_a_dataset_of_the_hub_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in: `datasets` takes a folder of that name before it asks the hub."""
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_bytes(_json_lines())
    (folder / "test.jsonl").write_bytes(_json_lines(RECORDS[:2]))
    monkeypatch.chdir(tmp_path)
    corpus = open_corpus("hf:owner/name")
    assert list(corpus.examples()) == EXPECTED
    assert (corpus.name, corpus.in_memory, corpus.count()) == ("hf:owner/name", False, len(EXPECTED))
    assert list(open_corpus("hf:owner/name:default:test").examples()) == EXPECTED[:2]
    with pytest.raises(CorpusError, match="hf:owner/name:default:dev: cannot be opened "):
        open_corpus("hf:owner/name:default:dev")
    with pytest.raises(CorpusError, match="not the name of a dataset; expected hf:NAME, "):
        open_corpus("hf:../name")


def test_nested_fields_are_read_by_their_path(tmp_path: Path) -> None:
    records = [{"doc": {"text": f"text {n}", "url": f"u{n}"}, "meta": {"id": f"i{n}", "year": n}} for n in range(3)]
    (tmp_path / "c.jsonl").write_bytes(_json_lines(records))
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(records), tmp_path / "c.parquet")
    for data in (tmp_path / "c.jsonl", tmp_path / "c.parquet", records, datasets.Dataset.from_list(records)):
        corpus = open_corpus(data, text_field="doc.text", id_field="meta.id")
        found = [(e.example_id, e.text, e.metadata) for e in corpus.examples()]
        assert found[1] == ("i1", "text 1", '{"doc":{"url":"u1"},"meta":{"year":1}}')
        kept = open_corpus(data, text_field="doc.text", id_field="meta.id", metadata=["meta.year", "absent"])
        assert [e.metadata for e in kept.examples()] == [f'{{"meta.year":{n}}}' for n in range(3)]
    with pytest.raises(CorpusError, match=r'no field "doc\.body"; found doc, meta; name the one to read with `text_'):
        list(open_corpus(tmp_path / "c.jsonl", text_field="doc.body").examples())


def test_array_longer_than_a_block_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trackstar.corpus import entries

    for block in (1, 7, 50):
        monkeypatch.setattr(entries, "BLOCK_BYTES", block)
        assert list(open_corpus(_array(tmp_path)).examples()) == EXPECTED


def test_limit_equals_the_first_records(stored: object) -> None:
    for limit in (1, 3, 100):
        corpus = open_corpus(stored, limit=limit)
        assert list(corpus.examples()) == EXPECTED[:limit]
        assert list(corpus.examples(2)) == EXPECTED[2:limit]


def test_count_is_the_number_of_examples(stored: object) -> None:
    for limit in (None, 3, 100):
        corpus = open_corpus(stored, limit=limit)
        assert corpus.count() == len(list(corpus.examples()))


def test_digest_does_not_change_between_two_openings(stored: object) -> None:
    assert open_corpus(stored).digest() == open_corpus(stored).digest()


def test_opening_and_reading_twice_gives_the_same_examples(stored: object) -> None:
    corpus = open_corpus(stored)
    first, second = corpus.examples(), corpus.examples()
    assert [next(first), next(second), next(first)] == [EXPECTED[0], EXPECTED[0], EXPECTED[1]]


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=20),
    st.sampled_from(["plain", "gzip", "zstd"]),
    st.booleans(),
)
def test_any_text_comes_back_from_json_lines(texts: list[str], compression: str, ascii_only: bool) -> None:
    lines = "".join(json.dumps({"text": text}, ensure_ascii=ascii_only) + "\n" for text in texts).encode()
    compress = {"plain": bytes, "gzip": gzip.compress, "zstd": zstandard.compress}[compression]
    ending = {"plain": "", "gzip": ".gz", "zstd": ".zst"}[compression]
    url = f"memory://property/c.jsonl{ending}"
    with fsspec.open(url, "wb") as stream:
        stream.write(compress(lines))  # pyright: ignore[reportAttributeAccessIssue]
    assert [example.text for example in open_corpus(url).examples()] == texts


def test_rows_beyond_one_block_keep_their_order(tmp_path: Path) -> None:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [f"text {n}" for n in range(2500)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "c.parquet", row_group_size=1500)
    for data in (tmp_path / "c.parquet", datasets.Dataset.from_dict({"text": texts})):
        corpus = open_corpus(data)
        assert [example.text for example in corpus.examples()] == texts
        for start in (1023, 1024, 1499, 1500, 2499):
            assert [example.record for example in corpus.examples(start)] == list(range(start, 2500))


def test_each_line_of_plain_text_that_is_not_blank_is_an_example(tmp_path: Path) -> None:
    path = tmp_path / "poem.txt"
    path.write_bytes("one \n\n \n two\r\nd\u2028rei".encode())
    assert [(e.example_id, e.text) for e in open_corpus(path).examples()] == [
        ("poem:0", "one "),
        ("poem:1", " two"),
        ("poem:2", "d\u2028rei"),
    ]


def test_names_come_from_the_id_field_or_the_first_default_field_or_the_record_number(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"

    def names(record: dict[str, object], **options: Any) -> list[str]:
        path.write_text(json.dumps({**record, "text": "x"}) + "\n" + json.dumps({**record, "text": "y"}))
        return [example.example_id for example in open_corpus(path, **options).examples()]

    assert names({"id": "i", "sentence_id": "s", "example_id": "e"}) == ["e", "e"]
    assert names({"id": "i", "sentence_id": "s"}) == ["s", "s"]
    assert names({"id": 17}) == ["17", "17"]
    assert names({"id": "i", "key": "k"}, id_field="key") == ["k", "k"]
    assert names({"key": "k"}) == ["c:0", "c:1"]
    assert [e.example_id for e in open_corpus(["x", "y"]).examples()] == ["example:0", "example:1"]


def test_fallback_names_do_not_repeat_across_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "c.txt").write_text("one\ntwo\n")
    names = [example.example_id for example in open_corpus(tmp_path).examples()]
    assert names == ["c:0", "c:1", "c:2", "c:3"]


def test_text_is_read_from_the_text_field(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"body": "x", "text": "y"}')
    assert next(open_corpus(path, text_field="body").examples()).text == "x"


@pytest.mark.parametrize(
    "build",
    [_jsonl, _gzipped, _zstandard, _parquet, _array, _xz, _arrow_file, _arrow_stream],
    ids=lambda build: build.__name__,
)
def test_any_changed_byte_of_a_file_changes_the_digest(build: Callable[[Path], Path], tmp_path: Path) -> None:
    path = build(tmp_path)
    corpus = open_corpus(path)

    def digest() -> str:
        """The digest of the file as it is now; its first record may be broken, so it is not opened as a corpus."""
        source = TableSource if path.suffix in (".parquet", ".arrow") else FileSource
        return dataclasses.replace(corpus, source=source(find_files(str(path)))).digest()

    content = path.read_bytes()
    digests = {corpus.digest()}
    places = range(0, len(content), max(1, len(content) // 60))
    for place in places:
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        digests.add(digest())
    for changed in (content[:-1], content + b"\n"):
        path.write_bytes(changed)
        digests.add(digest())
    assert len(digests) == 1 + len(places) + 2


@given(
    st.lists(st.tuples(st.text("ab", min_size=1, max_size=2), st.text("ab", max_size=2)), min_size=1, max_size=4),
    st.lists(st.tuples(st.text("ab", min_size=1, max_size=2), st.text("ab", max_size=2)), min_size=1, max_size=4),
)
def test_digest_in_memory_is_equal_for_equal_names_and_texts_only(
    one: list[tuple[str, str]], other: list[tuple[str, str]]
) -> None:
    def digest(records: list[tuple[str, str]]) -> str:
        examples = [Example(example_id=name, text=text, record=n) for n, (name, text) in enumerate(records)]
        return open_corpus(examples).digest()

    assert (digest(one) == digest(other)) == (one == other)


def test_digest_depends_on_the_choice_of_fields_and_limit(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"text": "x", "other": "y", "id": "i", "key": "k"}\n' * 3)
    options: list[dict[str, Any]] = [{}, {"text_field": "other"}, {"id_field": "key"}, {"limit": 1}, {"limit": 2}]
    assert len({open_corpus(tmp_path / "c.jsonl", **each).digest() for each in options}) == len(options)


def test_digest_depends_on_file_names_only_if_examples_are_named_after_them(tmp_path: Path) -> None:
    def digest(name: str, content: str) -> str:
        (tmp_path / name).write_text(content)
        return open_corpus(tmp_path / name).digest()

    assert digest("a.txt", "one\n") != digest("b.txt", "one\n")
    assert digest("a.jsonl", '{"id": "i", "text": "x"}') == digest("b.jsonl", '{"id": "i", "text": "x"}')


def _numbered(count: int) -> Corpus:
    return open_corpus([f"text {n}" for n in range(count)])


@given(st.integers(1, 40), st.integers(1, 50), st.integers(-5, 5))
def test_sample_is_deterministic_ordered_and_without_repetition(records: int, count: int, seed: int) -> None:
    corpus = _numbered(records)
    sample = corpus.sample(count, seed)
    numbers = [example.record for example in sample]
    assert sample == corpus.sample(count, seed)
    assert numbers == sorted(set(numbers))
    assert len(sample) == min(count, records)
    assert all(example.text == f"text {example.record}" for example in sample)
    assert set(numbers) <= {example.record for example in corpus.sample(count + 1, seed)}


def test_sample_is_uniform() -> None:
    corpus, draws = _numbered(20), 800
    counts = Counter(example.record for seed in range(draws) for example in corpus.sample(5, seed))
    # A record is in a sample with probability 1/4. χ² over 20 cells, scaled by (1 - 1/4)⁻¹·19/20, as a sample
    # does not repeat a record.
    expected = draws / 4
    statistic = sum((counts[record] - expected) ** 2 for record in range(20)) / (expected * 0.75) * 19 / 20
    assert statistic < 50  # 1.3e-4 beyond it with 19 degrees of freedom


def test_sample_is_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trackstar.corpus import sources

    path = tmp_path / "c.jsonl"
    path.write_bytes(_json_lines())
    corpus = open_corpus(path)
    opened: list[str] = []
    real = sources.open_raw
    monkeypatch.setattr(sources, "open_raw", lambda file: (opened.append(file.name), real(file))[1])
    corpus.sample(3, seed=0)
    assert opened == [str(path)]


def test_limit_bounds_the_sample(tmp_path: Path) -> None:
    assert [e.record for e in open_corpus(RECORDS, limit=3).sample(10, seed=0)] == [0, 1, 2]


def test_description_names_the_files_read_and_not_read(tmp_path: Path) -> None:
    assert open_corpus(_folder(tmp_path), limit=5).description == {
        "source": str(tmp_path),
        "format": "JSON lines, 2 files; not read: README.md",
        "records": "text, targets: all",
        "text_field": "text",
        "id_field": "id",
        "limit": "5",
    }


RELEASE_QUERY = {
    "fact_id": "f1",
    "entity0": "France",
    "relation": "capital",
    "entity1": "Paris",
    "entity1_alias": ["Lutetia"],
    "prompt0": "The capital of France is",
    "prompt1": "France's capital:",
    "prompt2": "France has the capital",
}


def test_queries_of_the_release_are_read_with_their_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(RELEASE_QUERY).encode()))
    (query,) = read_queries(path)
    assert (query.query_id, query.prompt, query.completion) == ("f1", "The capital of France is", "Paris")
    assert query.record == RELEASE_QUERY
    (other,) = read_queries(path, prompt_field="prompt2")
    assert other.prompt == "France has the capital"


def test_results_of_the_release_are_read_as_queries(tmp_path: Path) -> None:
    line = {"example_id": "x1", "inputs_plaintext": "The capital of France is", "targets_plaintext": "Paris"}
    (tmp_path / "r.jsonl").write_text(json.dumps(line))
    (query,) = read_queries(tmp_path / "r.jsonl")
    assert (query.query_id, query.prompt, query.completion) == ("x1", "The capital of France is", "Paris")


def test_plain_queries_are_named_by_their_field_or_their_line_number(tmp_path: Path) -> None:
    lines = [{"prompt": "a", "completion": "b"}, {"id": 4, "prompt": "a", "completion": "c"}]
    (tmp_path / "q.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    assert [query.query_id for query in read_queries(tmp_path / "q.jsonl")] == ["q:0", "4"]


def test_readers_are_imported_without_the_libraries_that_only_some_corpora_need() -> None:
    heavy = ("torch", "transformers", "datasets", "pyarrow", "fsspec", "zstandard", "rich")
    code = f"import sys, trackstar.corpus, trackstar.progress; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
