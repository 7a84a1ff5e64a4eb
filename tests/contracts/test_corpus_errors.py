"""Every defect of a corpus or a file of queries is a one-line error that names file and record."""

import gzip
import json
import lzma
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import fsspec
import pytest
import zstandard

from trackstar.corpus import (
    Example,
    Query,
    open_corpus,
    read_queries,
    tokenize_example,
    tokenize_examples,
    tokenize_query,
)
from trackstar.corpus import data_files as files_module
from trackstar.errors import CorpusError, ModelError, OptionError, TrackstarError

GOOD = b'{"id": "a", "text": "Paris"}\n'
GOOD_QUERY = b'{"query_id": "q", "prompt": "The capital is", "completion": "Paris"}\n'
LINES = GOOD * 3


class Bad(NamedTuple):
    """A file's content, the options to open it with, and the beginning of the expected message ({} is the path)."""

    name: str
    content: bytes
    message: str
    options: Mapping[str, Any] = MappingProxyType({})


def _parquet(rows: dict[str, list[Any]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(rows), sink, compression="none")
    return sink.getvalue().to_pybytes()


def _arrow(rows: dict[str, list[Any]]) -> bytes:
    import pyarrow as pa
    import pyarrow.ipc as ipc

    sink = pa.BufferOutputStream()
    table = pa.table(rows)
    with ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _parquet_with_bytes(text: bytes) -> bytes:
    """A Parquet file whose string column holds the bytes, which may not be UTF-8."""
    import pyarrow as pa

    placeholder = b"\x01" * len(text)
    return _parquet({"text": ["good", placeholder.decode()]}).replace(placeholder, text) if text else bytes(pa.nulls(0))


BAD_FILES = [
    Bad("empty.jsonl", b"", "{}: holds no record; expected at least one line that is not blank"),
    Bad("blank.jsonl", b"\n \n\r\n", "{}: holds no record; "),
    Bad("empty.txt", b"", "{}: holds no record; "),
    Bad("empty.parquet", b"", "{}: not a Parquet file ("),
    Bad("empty.jsonl.gz", b"", "{}: holds no record; "),
    Bad("empty.jsonl.zst", b"", "{}: holds no record; "),
    Bad("binary.jsonl", GOOD + bytes(range(256)), "{}:2: byte 0 is NUL; expected UTF-8 text; is the file binary"),
    Bad("binary.txt", b"one\n\x89PNG\x00\x00", "{}:2: byte 4 is NUL; "),
    Bad(
        "utf16.txt",
        "one".encode("utf-16"),
        "{}:1: byte 3 is NUL; expected UTF-8 text; is the file binary or in UTF-16?",
    ),
    Bad(
        "latin1.txt",
        b"one\ncaf\xe9\n",
        "{}:2: byte 3 is 0xe9, which is not UTF-8; expected UTF-8 text; convert the file",
    ),
    Bad("latin1.jsonl", GOOD + b'{"id": "b", "text": "caf\xe9"}', "{}:2: byte 24 is 0xe9, which is not UTF-8; "),
    Bad(
        "broken.jsonl",
        GOOD + b'{"id": "b", "text": "Par',
        "{}:2: broken JSON (Unterminated string starting at at character 20)",
    ),
    Bad("nul.jsonl", GOOD + b'{"id": "b", "text": "Par\x00is"}', "{}:2: byte 24 is NUL; "),
    Bad("control.jsonl", GOOD + b'{"id": "b", "text": "Par\x01is"}', "{}:2: broken JSON (Invalid control character at"),
    Bad("two_on_a_line.jsonl", GOOD.strip() + GOOD, "{}:1: broken JSON (Extra data at character 28)"),
    Bad("pretty.json", b'{\n "id": "a",\n "text": "x"\n}', "{}:1: broken JSON ("),
    Bad(
        "array.jsonl",
        b'[{"id": "a", "text": "x"}]',
        "{}:1: found an array, expected one JSON object per line; let the name of a file that is "
        "one array end in .json",
    ),
    Bad(
        "strings.json", b'["x"]', "{}: record 0: found a string, expected an object; write texts one per line, as .txt"
    ),
    Bad("last_comma.json", b'[{"text": "x"},]', "{}: record 1: found ']', expected an object; write the file again"),
    Bad("after_comma.json", b'[{"text": "x"},', "{}: record 1: found the end of the file, expected an object"),
    Bad("semicolons.csv", b"id;text\na;x\n", "{}:1: the header 'id;text' is one name, with semicolons in it; expected"),
    Bad("tabs.csv", b"id\ttext\na\tx\n", "{}:1: the header 'id\\ttext' is one name, with tabs in it; expected names"),
    Bad("commas.tsv", b"id,text\na,x\n", "{}:1: the header 'id,text' is one name, with commas in it; expected names"),
    Bad("no_array.json", b'[{"text": "x"}, 3]', "{}: record 1: found a number, expected an object"),
    Bad("empty_array.json", b"[ ]", "{}: holds no record; "),
    Bad("cut.json", b'[{"text": "x"}, {"text": "y', "{}: record 1: broken JSON (Unterminated string starting at at"),
    Bad("open.json", b'[{"text": "x"}', "{}: record 1: broken JSON (found the end of the file where ',' was expected)"),
    Bad("comma.json", b'[{"text": "x"} {"text": "y"}]', "{}: record 1: broken JSON (found '{' where ',' was expected)"),
    Bad("tail.json", b'[{"text": "x"}] []', "{}: text behind the JSON array; expected one array"),
    Bad("twice.json", b'[{"text": "x", "text": "y"}]', '{}: record 0: field "text" is repeated; expected each field'),
    Bad("latin1.json", b'[{"text": "caf\xe9"}]', "{}: record 0 or a later one: a byte 0xe9 is not UTF-8"),
    Bad("text_number.json", b'[{"text": "x"}, {"text": 3}]', '{}: record 1: field "text" is a number; expected a'),
    Bad("no_text.csv", b"id,body\na,x\n", '{}:2: no field "text"; found id, body; name the one to read'),
    Bad("ragged.csv", b"id,text\na,x\n\nb,y,z\n", "{}:4: found 3 values, expected 2, as many as the header has"),
    Bad("quotes.csv", b'text\n"x"y\n', "{}:2: broken CSV ("),
    Bad("open.csv", b'text\nx\n"y\n\n', "{}:3: broken CSV (unexpected end of data)"),
    Bad("header.tsv", b"text\ttext\nx\ty\n", "{}:1: the header names 'text' twice; expected each once"),
    Bad("latin1.csv", b"text\ncaf\xe9\n", "{}:2: byte 3 is 0xe9, which is not UTF-8"),
    Bad("empty.csv", b"text\n", "{}: holds no record; "),
    Bad("plain.jsonl.xz", LINES, "{}: damaged xz data ("),
    Bad("cut.jsonl.xz", lzma.compress(LINES)[:-9], "{}: after line 3: the compressed data ends early; expected"),
    Bad("plain.arrow", LINES, "{}: not a whole Arrow file or stream ("),
    Bad("no_column.arrow", _arrow({"content": ["x"]}), '{}: no field "text"; found content; name the one to read'),
    Bad("text_int.arrow", _arrow({"text": [1, 2]}), '{}: row 0: field "text" is a number; expected a string'),
    Bad("cut.arrow", _arrow({"text": ["x"] * 99})[:-300], "{}: not a whole Arrow file or stream ("),
    Bad("number.jsonl", GOOD + b"\n12\n", "{}:3: found a number, expected one JSON object per line"),
    Bad("null.jsonl", GOOD + b"null\n", "{}:2: found null, expected one JSON object per line"),
    Bad("string.jsonl", b'"Paris"\n', "{}:1: found a string, expected one JSON object per line"),
    Bad("deep.jsonl", GOOD + b'{"id":"b","text":' + b"[" * 200_000, "{}:2: "),
    Bad("digits.jsonl", GOOD + b'{"text":' + b"9" * 5000 + b"}", "{}:2: JSON that cannot be read (Exceeds the limit"),
    Bad(
        "no_text.jsonl",
        b'{"id": "a", "content": "x"}',
        '{}:1: no field "text"; found id, content; name the one to read with `text_field`',
    ),
    Bad("no_text_later.jsonl", GOOD + b'{"id": "b"}', '{}:2: no field "text"; found id; '),
    Bad("no_id_later.jsonl", GOOD + b'{"text": "x"}', '{}:2: no field "id"; found text; '),
    Bad("no_such_field.jsonl", GOOD, '{}:1: no field "body"; found id, text; ', {"text_field": "body"}),
    Bad(
        "no_such_id.jsonl",
        GOOD,
        '{}:1: no field "key"; found id, text; name the one to read with `id_field`',
        {"id_field": "key"},
    ),
    Bad("no_fields.jsonl", b"{}", '{}:1: no field "text"; found no fields; '),
    Bad("text_number.jsonl", GOOD + b'{"id": "b", "text": 3}', '{}:2: field "text" is a number; expected a string'),
    Bad("text_null.jsonl", GOOD + b'{"id": "b", "text": null}', '{}:2: field "text" is null; expected a string'),
    Bad("text_array.jsonl", GOOD + b'{"id": "b", "text": ["x"]}', '{}:2: field "text" is an array; '),
    Bad("text_object.jsonl", GOOD + b'{"id": "b", "text": {"x": 1}}', '{}:2: field "text" is an object; '),
    Bad(
        "id_null.jsonl", GOOD + b'{"id": null, "text": "x"}', '{}:2: field "id" is null; expected a name: a string or a'
    ),
    Bad("id_empty.jsonl", GOOD + b'{"id": "", "text": "x"}', '{}:2: field "id" is an empty string; '),
    Bad("id_boolean.jsonl", GOOD + b'{"id": true, "text": "x"}', '{}:2: field "id" is a boolean; '),
    Bad("id_float.jsonl", GOOD + b'{"id": 1.5, "text": "x"}', '{}:2: field "id" is a number; '),
    Bad(
        "surrogate.jsonl",
        GOOD + rb'{"id": "b", "text": "x\ud83d"}',
        "{}:2: the text holds half a surrogate pair (U+D83D at",
    ),
    Bad(
        "surrogate_id.jsonl", GOOD + rb'{"id": "\udc00", "text": "x"}', '{}:2: field "id" holds half a surrogate pair ('
    ),
    Bad(
        "repeated_field.jsonl",
        GOOD + b'{"id": "b", "text": "x", "text": "y"}',
        '{}:2: field "text" is repeated; expected each field once; leave one out',
    ),
    Bad(
        "huge_id.jsonl", GOOD + b'{"id": 1' + b"0" * 30 + b', "text": "x"}', '{}:2: field "id" is a number; expected a'
    ),
    Bad("plain.jsonl.gz", LINES, "{}: damaged gzip data (Not a gzipped file"),
    Bad("cut.jsonl.gz", gzip.compress(LINES)[:-9], "{}: after line 3: the compressed data ends early; expected"),
    Bad("cut_late.txt.gz", gzip.compress(b"a line\n" * 20_000)[:-4], "{}: after line 20000: the compressed data ends"),
    Bad(
        "flipped.jsonl.gz",
        gzip.compress(LINES, mtime=0)[:-8] + b"\0" * 8,
        "{}: after line 3: damaged gzip data (CRC",
    ),
    Bad("no_deflate.jsonl.gz", gzip.compress(b"", mtime=0)[:10] + b"\xff" * 30, "{}: damaged gzip data (Error -3"),
    Bad("tail.jsonl.gz", gzip.compress(LINES) + b"garbage", "{}: after line 3: damaged gzip data (Not a gzipped file"),
    Bad("plain.jsonl.zst", LINES, "{}: damaged zstd data ("),
    Bad("cut.jsonl.zst", zstandard.compress(LINES)[:-3], "{}: the compressed data ends early; expected a whole file"),
    Bad("tail.jsonl.zst", zstandard.compress(LINES) + b"garbage", "{}: damaged zstd data ("),
    Bad("plain.parquet", LINES, "{}: not a Parquet file ("),
    Bad("cut.parquet", _parquet({"text": ["x"] * 100})[:-20], "{}: not a Parquet file ("),
    Bad("no_rows.parquet", _parquet({"text": []}), "{}: holds no record; expected at least one"),
    Bad(
        "no_column.parquet",
        _parquet({"content": ["x"]}),
        '{}: no field "text"; found content; name the one to read with `text_field`',
    ),
    Bad("text_int.parquet", _parquet({"text": [1, 2]}), '{}: row 0: field "text" is a number; expected a string'),
    Bad("text_null.parquet", _parquet({"text": ["x", None]}), '{}: row 1: field "text" is null; expected a string'),
    Bad(
        "latin1.parquet",
        _parquet_with_bytes(b"caf\xe9 cr\xe8me"),
        "{}: row 1: byte 3 is not UTF-8; expected UTF-8 text",
    ),
    Bad(
        "zeroed.parquet", b"PAR1" + b"\0" * 60 + _parquet({"text": ["y" * 60] * 9})[64:], "{}: row group 0 is damaged ("
    ),
    Bad("notes.docx", GOOD, "{}: its name has no known ending; expected .jsonl"),
    Bad("table.parquet.gz", GOOD, "{}: its name has no known ending; expected .jsonl"),
    Bad("limit.jsonl", GOOD, "`limit`: expected 1 or more, found 0", {"limit": 0}),
    Bad(
        "large_limit.jsonl",
        GOOD,
        "`limit`: expected less than 2^63, found 99999999999999999999",
        {"limit": 99999999999999999999},
    ),
    Bad(
        "id_of_text.txt",
        b"one\n",
        "`id_field`: expected none, as {} holds bare text, which has no fields, found id; leave",
        {"id_field": "id"},
    ),
]

BAD_QUERIES = [
    Bad("empty.jsonl", b"", "{}: holds no query; expected at least one line that is not blank"),
    Bad("broken.jsonl", GOOD_QUERY + b"{", "{}:2: broken JSON ("),
    Bad("array.jsonl", b"[]", "{}:1: found an array, expected one JSON object per line"),
    Bad("no_prompt.jsonl", b'{"completion": "x"}', "{}:1: no prompt; expected a field prompt or prompt0 or"),
    Bad(
        "no_completion.jsonl",
        b'{"prompt0": "x", "entity0": "y"}',
        "{}:1: no completion; expected a field completion or",
    ),
    Bad(
        "no_prompt9.jsonl", GOOD_QUERY, "{}:1: no prompt; expected a field prompt9; found", {"prompt_field": "prompt9"}
    ),
    Bad(
        "prompt_number.jsonl",
        b'{"prompt": 1, "completion": "x"}',
        '{}:1: field "prompt" is of type int; expected a string',
    ),
    Bad(
        "empty_completion.jsonl",
        b'{"prompt": "x", "completion": " "}',
        "{}:1: the completion is empty; expected the text",
    ),
    Bad("twice.jsonl", GOOD_QUERY * 2, '{}:2: query "q" is also at {}:1; name each once'),
    Bad("id_list.jsonl", b'{"id": [], "prompt": "x", "completion": "y"}', '{}:1: field "id" does not name the query; '),
    Bad(
        "surrogate.jsonl",
        rb'{"prompt": "\ud800", "completion": "y"}',
        '{}:1: field "prompt" holds half a surrogate pair (',
    ),
    Bad(
        "surrogate_carried.jsonl",
        rb'{"query_id": "a", "prompt": "x", "completion": "y", "entity0": "\ud83d"}',
        '{}:1: field "entity0" holds half a surrogate pair (U+D83D at character 0); expected text; remove it',
    ),
    Bad(
        "surrogate_nested.jsonl",
        rb'{"prompt": "x", "completion": "y", "a": {"b": ["ok", {"c": "\udc00"}]}}',
        '{}:1: field "a.b[1].c" holds half a surrogate pair (U+DC00',
    ),
    Bad(
        "surrogate_key.jsonl",
        rb'{"prompt": "x", "completion": "y", "a": {"\ud800": 1}}',
        "{}:1: the name of a field ",
    ),
    Bad(
        "nan.jsonl",
        b'{"prompt": "x", "completion": "y", "c4_frequency": NaN}',
        '{}:1: field "c4_frequency" is nan, which is no JSON; expected a finite number or null; correct it',
    ),
    Bad("infinity.jsonl", b'{"prompt": "x", "completion": "y", "a": [-Infinity]}', '{}:1: field "a[0]" is -inf, '),
    Bad("huge_float.jsonl", b'{"prompt": "x", "completion": "y", "a": 1e999}', '{}:1: field "a" is inf, which is no'),
    Bad(
        "huge_integer.jsonl",
        b'{"prompt": "x", "completion": "y", "a": 1' + b"0" * 20 + b"}",
        '{}:1: field "a" is a number of more than 64 bits; expected a smaller one; write it as text',
    ),
    Bad(
        "deep.jsonl",
        b'{"prompt": "x", "completion": "y", "a": ' + b"[" * 70 + b"]" * 70 + b"}",
        '{}:1: field "a[0][0]',
    ),
    Bad("deepest.jsonl", b'{"prompt": "x", "completion": "y", "a": ' + b"[" * 100_000, "{}:1: "),
    Bad(
        "repeated.jsonl",
        b'{"prompt": "x", "completion": "y", "prompt": "z"}',
        '{}:1: field "prompt" is repeated; expected each field once; leave one out',
    ),
    Bad(
        "queries.txt",
        b"The capital of France is Paris\n",
        "{}: plain text; queries are records with a prompt; write JSON",
    ),
    Bad("cut.jsonl.gz", gzip.compress(GOOD_QUERY)[:-9], "{}: after line 1: the compressed data ends early; "),
]


def _raised(action: Callable[[], object], kind: type[TrackstarError]) -> str:
    """The message of the one error raised, which must be one short line."""
    with pytest.raises(kind) as caught:
        action()
    message = str(caught.value)
    assert type(caught.value) is kind
    assert "\n" not in message
    assert len(message) < 600
    return message


@pytest.mark.parametrize("bad", BAD_FILES, ids=lambda bad: bad.name)
def test_bad_corpus_file_is_one_line_that_names_file_and_record(bad: Bad, tmp_path: Path) -> None:
    path = tmp_path / bad.name
    path.write_bytes(bad.content)
    kind = OptionError if bad.message.startswith("`") else CorpusError
    message = _raised(lambda: list(open_corpus(str(path), **bad.options).examples()), kind)
    assert message.startswith(bad.message.replace("{}", str(path)))


@pytest.mark.parametrize("bad", BAD_QUERIES, ids=lambda bad: bad.name)
def test_bad_query_file_is_one_line_that_names_file_and_line(bad: Bad, tmp_path: Path) -> None:
    path = tmp_path / bad.name
    path.write_bytes(bad.content)
    message = _raised(lambda: read_queries(path, **bad.options), CorpusError)
    assert message.startswith(bad.message.replace("{}", str(path)))


def _dictionary(folder: Path) -> str:
    import datasets

    one = datasets.Dataset.from_dict({"text": ["x"]})
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(folder / "splits")
    return str(folder / "splits")


def _damaged_dataset(folder: Path) -> str:
    import datasets

    datasets.Dataset.from_dict({"text": ["x"]}).save_to_disk(folder / "saved")
    next((folder / "saved").glob("*.arrow")).write_bytes(b"ARROW1 no longer")
    return str(folder / "saved")


def _empty_folder(folder: Path) -> str:
    (folder / "nothing").mkdir()
    return str(folder / "nothing")


def _folder_of(*names: str) -> Callable[[Path], str]:
    def build(folder: Path) -> str:
        for name in names:
            (folder / name).write_bytes(GOOD)
        return str(folder)

    return build


class _DeniedFileSystem(fsspec.AbstractFileSystem):
    """A file system that has every file and denies opening it."""

    protocol = "denied"

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        return {"name": path, "type": "file", "size": 9}

    def _open(self, path: str, *_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied", path)


def _denied(_: Path) -> str:
    fsspec.register_implementation("denied", _DeniedFileSystem, clobber=True)
    return "denied://c.jsonl"


BAD_PLACES: list[tuple[str, Callable[[Path], str], str]] = [
    ("missing", lambda folder: str(folder / "no.jsonl"), r"no\.jsonl: no such file or folder; check the path"),
    ("missing folder", lambda folder: str(folder / "no" / "no"), r"no: no such file or folder; check the path"),
    ("empty path", lambda _: " ", "the path is empty; give a file, a folder or a glob"),
    ("empty folder", _empty_folder, r"nothing: the folder holds no file that can be read; expected endings"),
    ("folder of other files", _folder_of("a.docx", ".b.jsonl", "_c.txt"), "the folder holds no file that can be read"),
    ("mixed folder", _folder_of("a.jsonl", "b.txt"), r"mixes formats: a\.jsonl \(jsonl\); b\.txt \(text\); select the"),
    (
        "glob of nothing",
        lambda folder: str(folder / "*.jsonl"),
        r"\*\.jsonl: the pattern holds no file that can be read",
    ),
    ("several splits", _dictionary, r"splits: a saved dataset of several splits \(test, train\); name one of them"),
    ("damaged dataset", _damaged_dataset, r"saved: a saved dataset that cannot be opened \(.*\); save it again"),
    (
        "unknown protocol",
        lambda _: "gopher2://x/y.jsonl",
        r"gopher2://x/y\.jsonl: not a path or URL that can be opened \(",
    ),
    ("missing package", lambda _: "gs://bucket/y.jsonl", r"gs://bucket/y\.jsonl: its file system needs a package \("),
    ("denied", _denied, r"^denied://c\.jsonl: permission denied; expected a file that this user can read"),
]


@pytest.mark.parametrize(("name", "build", "message"), BAD_PLACES, ids=[each[0] for each in BAD_PLACES])
def test_bad_place_is_one_line_that_names_it(
    name: str, build: Callable[[Path], str], message: str, tmp_path: Path
) -> None:
    assert re.search(message, _raised(lambda: open_corpus(build(tmp_path)), CorpusError))


BAD_SEQUENCES: list[tuple[object, str]] = [
    ([], "the sequence of examples is empty; expected at least one"),
    (["good", 3], "record 1: found int, expected a string, a mapping or an Example"),
    ([{"text": "good"}, {"body": "x"}], 'record 1: no field "text"; found body; name the one to read'),
    ([{"text": "good"}, {"text": b"x"}], 'record 1: field "text" is of type bytes; expected a string'),
    (["good", "bad\ud800"], "record 1: the text holds half a surrogate pair (U+D800 at character 3); expected text"),
    (b"bytes", "a corpus of type bytes; expected a path, hf:NAME, a datasets.Dataset, a frame"),
    ({"text": "x"}, "a corpus of type dict; expected a path"),
    (3, "a corpus of type int; expected a path"),
    (None, "a corpus of type NoneType; expected a path"),
    (iter(["x", 3]), "record 1: found int, expected a string, a mapping or an Example"),
    (iter([]), "in memory: holds no record; expected at least one"),
    (lambda: 1 / 0, "in memory: cannot be read from record 0 on (ZeroDivisionError: division by zero)"),
]


@pytest.mark.parametrize(("data", "message"), BAD_SEQUENCES, ids=[each[1][:24] for each in BAD_SEQUENCES])
def test_bad_sequence_is_one_line_that_names_the_record(data: object, message: str) -> None:
    assert _raised(lambda: list(open_corpus(data).examples()), CorpusError).startswith(message)


def test_dataset_of_several_splits_or_without_the_column_is_refused() -> None:
    import datasets

    dataset = datasets.Dataset.from_dict({"text": ["x"], "n": [1]})
    assert "several splits (train)" in _raised(
        lambda: open_corpus(datasets.DatasetDict({"train": dataset})), CorpusError
    )
    assert _raised(lambda: open_corpus(dataset, text_field="body"), CorpusError).startswith(
        'datasets.Dataset: no field "body"; found text, n; '
    )
    assert _raised(lambda: open_corpus(dataset, text_field="n"), CorpusError).startswith(
        'datasets.Dataset: record 0: field "n" is a number; expected a string'
    )
    assert _raised(lambda: open_corpus(dataset.select([])), CorpusError).startswith("datasets.Dataset: holds no record")


def test_line_without_end_is_refused_before_it_fills_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "LONGEST_LINE", 2**20)
    path = tmp_path / "long.jsonl.zst"
    path.write_bytes(zstandard.compress(GOOD + b"a" * (2**24)))
    message = _raised(lambda: list(open_corpus(path).examples()), CorpusError)
    assert message.startswith(f"{path}:2: the line is longer than 1 MiB; expected one record per line")


def test_line_of_a_megabyte_is_read(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    text = "Paris " * 200_000
    path.write_text(json.dumps({"text": text}))
    assert next(open_corpus(path).examples()).text == text


def test_error_of_a_record_is_raised_when_the_record_is_read_and_not_before(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(LINES + b"broken\n" + GOOD)
    examples = open_corpus(path).examples()
    assert [next(examples).record for _ in range(3)] == [0, 1, 2]
    assert f"{path}:4: broken JSON" in _raised(lambda: next(examples), CorpusError)
    assert [example.record for example in open_corpus(path).examples(start=4)] == [4]


def test_credentials_of_a_url_are_in_no_message() -> None:
    message = _raised(lambda: open_corpus("gopher2://me:secret@host/y.jsonl"), CorpusError)
    assert message.startswith("gopher2://host/y.jsonl: ")
    with fsspec.open("memory://me:secret@host/y.jsonl", "wb") as stream:
        stream.write(b"broken")  # pyright: ignore[reportAttributeAccessIssue]
    message = _raised(lambda: open_corpus("memory://me:secret@host/y.jsonl"), CorpusError)
    assert message.startswith("memory://host/y.jsonl:1: broken JSON")


def test_metadata_that_is_no_text_is_shown_as_text() -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    odd = {"text": "x", "half": "a\ud83d", "pair": "\ud83d\ude42", "\ud800": "name", "nan": float("nan"), "deep": deep}
    (found,) = open_corpus([{**odd, "keys": {(1, 2): 3}}]).metadata()
    assert found == {
        "half": "a\ufffd", "pair": "🙂", "\ufffd": "name", "nan": "NaN", "deep": "a list that cannot be shown",
        "keys": "a dict that cannot be shown",
    }  # fmt: skip
    json.dumps(found, ensure_ascii=False).encode()


def test_negative_start_and_empty_sample_are_refused() -> None:
    corpus = open_corpus(["a text"])
    assert _raised(lambda: corpus.examples(start=-1), OptionError) == "`start`: expected 0 or more, found -1"
    assert _raised(lambda: corpus.sample(0, seed=0), OptionError) == "`count`: expected 1 or more, found 0"


def _example(text: str) -> Example:
    return Example(example_id="e7", text=text, record=7)


def _query(prompt: str, completion: str) -> Query:
    return Query(query_id="q7", prompt=prompt, completion=completion)


def test_windows_without_room_are_refused(tiny_tokenizer: Any) -> None:
    for window_tokens, overlap, message in [
        (2, 1, "`window_tokens`: expected 3 or more (1 special tokens, 1 of overlap and one target), found 2"),
        (9, 8, "`window_tokens`: expected 10 or more (1 special tokens, 8 of overlap and one target), found 9"),
        (9, 0, "`overlap`: expected 1 or more, found 0"),
    ]:
        options: dict[str, Any] = {"window_tokens": window_tokens, "overlap": overlap}
        assert _raised(lambda o=options: tokenize_example(_example("x"), tiny_tokenizer, **o), OptionError) == message
    message = _raised(lambda: tokenize_query(_query("a", "b"), tiny_tokenizer, window_tokens=2), OptionError)
    assert message.startswith("`window_tokens`: expected ")
    assert message.endswith(", found 2")


def test_text_that_cannot_be_tokenized_names_the_example(tiny_tokenizer: Any) -> None:
    examples = [Example(example_id=f"e{n}", text=text, record=n) for n, text in enumerate(["ok", "bad\udfff"])]
    message = _raised(lambda: list(tokenize_examples(examples, tiny_tokenizer, window_tokens=8)), CorpusError)
    assert message.startswith("example e1: the text holds half a surrogate pair (U+DFFF at character 3)")


def test_tokenizer_that_fails_names_the_example() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    word_level = Tokenizer(models.WordLevel({"known": 0}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=word_level)
    message = _raised(lambda: tokenize_example(_example("unknown"), tokenizer, window_tokens=8), ModelError)
    assert message.startswith("example e7: the tokenizer cannot read it (")


def test_slow_tokenizer_is_refused() -> None:
    class SlowTokenizer:
        is_fast = False

    message = _raised(lambda: tokenize_example(_example("x"), SlowTokenizer(), window_tokens=8), ModelError)
    assert message.startswith("the tokenizer is a SlowTokenizer, ")
    assert "expected a fast tokenizer; save it with its tokenizer.json" in message


@pytest.mark.parametrize(
    ("prompt", "completion", "special_tokens", "message"),
    [
        ("Paris is", "", "bos", "query q7: the completion is empty; "),
        ("Paris is", " \n", "bos", "query q7: the completion is empty; "),
        ("Paris is", "x\ud800", "bos", "query q7: the text holds half a surrogate pair (U+D800 at character 10)"),
        (
            "Paris is",
            "1 2 3 4 5 6 7 8 9",
            "bos",
            "query q7: the completion has 18 tokens, and 7 fit the window; shorten it",
        ),
        ("Paris is", "1 2 3 4", "plain", "query q7: the completion has 8 tokens, and 7 fit the window; shorten it"),
        ("", "Paris", "plain", "query q7: the prompt is empty and the tokenizer puts nothing before it, so "),
    ],
)
def test_bad_query_is_one_line_that_names_it(prompt: str, completion: str, special_tokens: Any, message: str) -> None:
    from tiny_models import tiny_tokenizer

    tokenizer = tiny_tokenizer(special_tokens)
    found = _raised(lambda: tokenize_query(_query(prompt, completion), tokenizer, window_tokens=8), CorpusError)
    assert found.startswith(message)


def test_completion_without_a_token_is_refused() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordPiece({"paris": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Split("-", "removed")  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    message = _raised(lambda: tokenize_query(_query("paris\n", "---"), tokenizer, window_tokens=8), CorpusError)
    assert message == "query q7: the completion has no token; expected at least one"
