"""An interrupted index is finished with the same bytes, whatever its corpus is read from."""

import csv
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from small_index import index_bytes
from tiny_models import SENTENCES, save_tiny_model
from trackstar import build_index, finish_index, open_corpus
from trackstar.errors import CorpusError
from trackstar.store import IndexWriter

RECORDS = [{"id": f"r{n}", "text": f"{SENTENCES[n % 8]} {n}", "year": str(n)} for n in range(11)]
SETTINGS: dict[str, Any] = {
    "side": 8, "layer_blocks": 1, "codec": "1-bit", "shard_examples": 3, "whitening_examples": 4,
    "second_moment_examples": 4, "progress": False,
}  # fmt: skip


def _lines(folder: Path) -> Path:
    (folder / "c.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return folder / "c.jsonl"


def _array(folder: Path) -> Path:
    (folder / "c.json").write_text(json.dumps(RECORDS, indent=2))
    return folder / "c.json"


def _csv(folder: Path) -> Path:
    with (folder / "c.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(RECORDS[0]))
        writer.writeheader()
        writer.writerows(RECORDS)
    return folder / "c.csv"


def _xz(folder: Path) -> Path:
    (folder / "c.jsonl.xz").write_bytes(lzma.compress(_lines(folder).read_bytes()))
    return folder / "c.jsonl.xz"


def _arrow(folder: Path) -> Path:
    import pyarrow as pa
    import pyarrow.ipc as ipc

    table = pa.Table.from_pylist(RECORDS)
    with ipc.new_stream(str(folder / "c.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    return folder / "c.arrow"


def _frame(_: Path) -> object:
    import pandas

    return pandas.DataFrame(RECORDS)


FILES: list[Callable[[Path], Path]] = [_array, _csv, _xz, _arrow]
CORPORA: list[Callable[[Path], object]] = [*FILES, _frame, lambda _: lambda: iter(RECORDS)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("resuming") / "model")


@pytest.mark.parametrize("options", [{}, {"pack": 16}], ids=["documents", "packed"])
@pytest.mark.parametrize("corpus", CORPORA, ids=lambda corpus: corpus.__name__.strip("_<>"))
def test_an_interrupted_index_ends_with_the_bytes_of_an_undisturbed_one(
    corpus: Callable[[Path], object], options: dict[str, Any], model: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    data = corpus(tmp_path)
    build_index(model, data, tmp_path / "whole", **SETTINGS, **options)
    real, written = IndexWriter.write_shard, []

    def interrupted(self: IndexWriter, content: Any) -> Any:
        if len(written) == 3:  # one shard of the first pass, two of the index
            raise KeyboardInterrupt
        written.append(content)
        return real(self, content)

    with monkeypatch.context() as patch:
        patch.setattr(IndexWriter, "write_shard", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build_index(model, data, tmp_path / "cut", **SETTINGS, **options)
    resumed = build_index(model, corpus(tmp_path), tmp_path / "cut", **SETTINGS, **options)
    assert index_bytes(tmp_path / "cut") == index_bytes(tmp_path / "whole")
    lines = build_index(model, _lines(tmp_path), tmp_path / "lines", **SETTINGS, **options)
    for found, expected in zip(resumed.examples(), lines.examples(), strict=True):
        assert found.example.token_ids.tolist() == expected.example.token_ids.tolist()
        assert (found.example.example_id, found.metadata) == (expected.example.example_id, expected.metadata)


def test_array_tasks_pack_as_one_process_does(model: Path, tmp_path: Path) -> None:
    data = _array(tmp_path)
    build_index(model, data, tmp_path / "whole", **SETTINGS, pack=16)
    for share in ("2/2", "1/2"):
        build_index(model, data, tmp_path / "parts", **SETTINGS, pack=16, share=share)
    finish_index(tmp_path / "parts", progress=False)
    assert index_bytes(tmp_path / "parts") == index_bytes(tmp_path / "whole")


@pytest.mark.parametrize("corpus", FILES, ids=lambda corpus: corpus.__name__.strip("_"))
def test_a_file_that_changes_while_it_is_read_is_noticed(corpus: Callable[[Path], Path], tmp_path: Path) -> None:
    path = corpus(tmp_path)
    opened = open_corpus(path)
    examples = opened.examples()
    next(examples)
    content = path.read_bytes()
    path.write_bytes(content + b"\n")
    with pytest.raises(CorpusError, match="changed while it was read"):
        list(examples)
    with pytest.raises(CorpusError, match="changed while it was read"):
        list(opened.examples())
