"""The source of what a caller passes as a corpus: a path, a name on the hub, or an object in memory."""

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, cast

from trackstar.corpus.data_files import find_files
from trackstar.corpus.local_files import check_no_special_inside
from trackstar.corpus.sources import FileSource, IterableSource, SequenceSource, Source, Spool
from trackstar.corpus.tables import DatasetSource, TableSource, frame_source
from trackstar.errors import CorpusError
from trackstar.text import abridged, first_line, one_line

HUB = "hf:"
"""Prefix of a dataset's name on the hub."""

_DATASET_NAME = "datasets.Dataset"
_IN_MEMORY = "in memory"
_HUB_NAME = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*)?")
_EXPECTED = (
    "expected a path, hf:NAME, a datasets.Dataset, a frame of pandas or polars, or texts, mappings or Examples as a "
    "list, an iterator or a function that returns one"
)


def source_of(data: object, limit: int | None = None) -> Source:
    """The source of a corpus.

    Args:
        data: What the caller passes; see `open_corpus`.
        limit: Most records that will be read. Iterators and streams are asked for no more; files, tables and
            lists are sources of all their records.

    Raises:
        CorpusError: It cannot be one, does not exist, or cannot be opened.
    """
    if isinstance(data, (str, os.PathLike)):
        path = os.fsdecode(os.fspath(data))
        return _hub_source(path, limit) if path.startswith(HUB) else _path_source(path)
    found = _library_source(data, limit)
    if found is not None:
        return found
    if isinstance(data, Sequence) and not isinstance(data, (bytes, bytearray, memoryview)):
        return SequenceSource(data)
    if isinstance(data, (bytes, bytearray, memoryview, Mapping)) or data is None:
        raise CorpusError(f"a corpus of type {type(data).__name__}; {_EXPECTED}")
    return _iterable_source(data, limit)


def _library_source(data: Any, limit: int | None) -> Source | None:
    """The source of an object of another library; only a caller who has imported that can pass one, so it is
    not imported here.
    """
    datasets, pandas = sys.modules.get("datasets"), sys.modules.get("pandas")
    if datasets is not None:
        if isinstance(data, datasets.Dataset):
            return DatasetSource(data, name=_DATASET_NAME, stem="example", in_memory=True)
        if isinstance(data, (datasets.DatasetDict, datasets.IterableDatasetDict)):
            splits = ", ".join(map(str, cast("Mapping[str, object]", data)))
            kind = type(data).__name__
            raise CorpusError(f"a {kind} of several splits ({splits}); expected one of them: dataset[SPLIT]")
        if isinstance(data, datasets.IterableDataset):
            return IterableSource(
                data.__iter__, name="datasets.IterableDataset", kind="datasets.IterableDataset", length=None,
                in_memory=True, limit=limit,
            )  # fmt: skip
    if pandas is not None and isinstance(data, pandas.DataFrame):
        return frame_source(data, "pandas.DataFrame")
    if hasattr(data, "__arrow_c_stream__"):
        return frame_source(data, f"{type(data).__module__.split('.')[0]}.{type(data).__name__}")
    return None


def _iterable_source(data: Any, limit: int | None) -> Source:
    """The source of an iterator, of an iterable object, or of a function that returns an iterator."""
    length = len(data) if hasattr(type(data), "__len__") else None
    if isinstance(data, Iterator):
        begin: Callable[[], Iterator[object]] = Spool(data, name=_IN_MEMORY, limit=limit)
    elif hasattr(type(data), "__iter__"):
        begin = data.__iter__
    elif callable(data):
        begin = cast("Callable[[], Iterator[object]]", data)
    else:
        raise CorpusError(f"a corpus of type {type(data).__name__}; {_EXPECTED}")
    return IterableSource(begin, name=_IN_MEMORY, kind="iterator", length=length, in_memory=True, limit=limit)


def _path_source(path: str) -> Source:
    data_files = find_files(path)
    name = data_files.name
    if not data_files.dataset:
        tables = data_files.files[0].format in ("parquet", "arrow")
        return TableSource(data_files) if tables else FileSource(data_files)
    import datasets

    check_no_special_inside(path)
    try:
        dataset = datasets.load_from_disk(path)
    except Exception as error:
        reason = one_line(error) or type(error).__name__
        raise CorpusError(f"{name}: a saved dataset that cannot be opened ({reason}); save it again") from error
    return DatasetSource(dataset, name=name, stem=PurePosixPath(path).name, in_memory=False)


def _hub_source(path: str, limit: int | None) -> Source:
    """A dataset of the hub, streamed: `hf:NAME[:CONFIG[:SPLIT]]`; the split is `train` unless it is named."""
    name, *rest = path.removeprefix(HUB).split(":")
    if not _HUB_NAME.fullmatch(name) or len(rest) > 2:
        raise CorpusError(
            f"{abridged(path)}: not the name of a dataset; expected hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT, "
            "such as hf:owner/name:default:train"
        )
    config = rest[0] if rest and rest[0] else None
    split = rest[1] if len(rest) == 2 and rest[1] else "train"
    import datasets

    try:
        stream = datasets.load_dataset(name, config, split=split, streaming=True)
    except Exception as error:
        reason = first_line(error, 300)
        raise CorpusError(
            f"{path}: cannot be opened ({type(error).__name__}: {reason}); expected a dataset that this machine can "
            "reach, with its configuration and split as hf:NAME:CONFIG:SPLIT"
        ) from error
    return IterableSource(
        stream.__iter__,
        name=path,
        kind=f"datasets, streamed, split {split}",
        length=None,
        in_memory=False,
        limit=limit,
    )
