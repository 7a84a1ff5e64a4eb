"""What is indexed and asked while faults happen: a tiny model, a corpus with empty records, and what all of it gives.

Shards, groups and parts are made small, so that there are many moments between two of them to be hit.
"""

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from shard_bytes import without_places
from tiny_models import save_tiny_model

RECORDS, FURTHER_RECORDS, SAMPLE = 160, 50, 60
WORDS = "Paris is the capital of France Berlin Germany people speak".split()
Kind = Literal["1-bit", "float16"]
KINDS: tuple[Kind, ...] = ("1-bit", "float16")
"""Two indexes: in whitened coordinates, with a first pass; in projected ones, with R_train summed over the shards."""

_SHARED: dict[str, Any] = {
    "side": 8,
    "layer_blocks": 2,
    "batch_tokens": 256,
    "window_tokens": 24,
    "overlap": 4,
    "second_moment_examples": 16,
    "shard_examples": 24,
    "progress": False,
}
_OF_KIND: dict[Kind, dict[str, Any]] = {
    "1-bit": {"codec": "1-bit", "whitening_examples": SAMPLE},
    "float16": {"codec": "float16"},
}
_PROMPTS = ("Paris is the capital", "people in Germany speak", "Berlin is")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Where everything is; it goes from process to process.

    Attributes:
        folder: Of all that is kept.
        model: The model's folder.
        corpus: What is indexed.
        further: A second corpus, to be added or merged.
    """

    folder: Path
    model: str
    corpus: str
    further: str

    @classmethod
    def made(cls, folder: Path) -> "Setting":
        """Write the model and the corpora."""
        generator = random.Random(0)
        folder.mkdir(parents=True, exist_ok=True)
        model = save_tiny_model(folder / "model", "llama")
        corpus = _write(folder / "corpus.jsonl", "e", RECORDS, generator)
        further = _write(folder / "further.jsonl", "f", FURTHER_RECORDS, generator)
        return cls(folder=folder, model=str(model), corpus=str(corpus), further=str(further))

    def undisturbed(self, name: str) -> Path:
        """Where the result of that name is that nothing has disturbed."""
        return self.folder / "undisturbed" / name


def _write(path: Path, prefix: str, count: int, generator: random.Random) -> Path:
    """Records of none to some forty words, the last ones and some others empty."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            length = generator.choice((0, 2, 3, 5, 8, 24)) if number < count - 3 else 0
            text = " ".join(generator.choices(WORDS, k=length))
            file.write(json.dumps({"id": f"{prefix}{number}", "text": text}) + "\n")
    return path


def make_small() -> None:
    """Let this process cut work into small parts and keep what it has after each of them."""
    from trackstar.attribution import streaming
    from trackstar.indexing import array_tasks as arrays
    from trackstar.indexing import groups as shard_groups
    from trackstar.indexing import shard_writing as indexing
    from trackstar.indexing import train_whitening as first_pass
    from trackstar.retrieval import reranking

    torch.set_num_threads(1)
    changes: dict[Any, dict[str, Any]] = {
        first_pass: {"_SHARD_EXAMPLES": 20},
        shard_groups: {"GROUP_EXAMPLES": 10},
        indexing: {"_SAVE_PROGRESS_EVERY": 0.0, "_ROWS_AT_ONCE": 10},
        arrays: {"_CHECK_EVERY": 0.05},
        reranking: {"_ROWS_AT_ONCE": 40},
        streaming: {"_EXAMPLES_AT_ONCE": 40, "_SAVE_EVERY": 0.0},
    }
    for module, values in changes.items():
        for name, value in values.items():
            assert hasattr(module, name), (module, name)
            setattr(module, name, value)


# What is done, each as a function of plain values, so that any process can do it.


def index(setting: Setting, kind: Kind, out: str, share: str | None = None, workers: Any = None) -> None:
    """Index the corpus, or a share of it."""
    from trackstar.indexing.build import build_index
    from trackstar.workers.protocol import THIS_PROCESS

    options = _SHARED | _OF_KIND[kind]
    build_index(setting.model, setting.corpus, out, share=share, workers=workers or THIS_PROCESS, **options)


def finish(out: str) -> None:
    """Complete an index that tasks have made."""
    from trackstar.indexing.array_tasks import finish_index

    finish_index(out, progress=False)


def index_apart(setting: Setting, which: str, out: str) -> None:
    """Index one of the corpora without V, so that the two indexes are made alike and can be merged."""
    from trackstar.indexing.build import build_index

    options = _SHARED | _OF_KIND["float16"]
    build_index(setting.model, which, out, second_moment="none", **options)


def convert(setting: Setting, codec: Literal["1-bit", "int8"], out: str) -> None:
    """Code the projected index anew, whitened by its own R_train."""
    from trackstar.editing.converting import convert_index

    convert_index(setting.undisturbed("float16"), out, codec=codec, progress=False)


def merge(setting: Setting, out: str) -> None:
    """Join the two indexes that were made alike."""
    from trackstar.editing.merging import merge_indexes

    merge_indexes([setting.undisturbed("one"), setting.undisturbed("two")], out, duplicate_ids="number", progress=False)


def remove(setting: Setting, kind: Kind, out: str) -> None:
    """Leave out the documents of every seventh record that has any."""
    from trackstar.editing.removing import remove_examples
    from trackstar.store import Index

    source = setting.undisturbed(kind)
    names = sorted({stored.example.parent_id for stored in Index.open(source).examples()})[::7]
    remove_examples(source, names, out, progress=False)


def add(setting: Setting, kind: Kind, out: str) -> None:
    """Add the second corpus."""
    from trackstar.editing.adding import add_examples

    add_examples(setting.undisturbed(kind), setting.further, out, batch_tokens=256, progress=False)


def _questions() -> list[Any]:
    from trackstar.corpus import Query

    return [
        Query(query_id=f"{number}", prompt=prompt, completion=completion)
        for number, (prompt, completion) in enumerate(
            (prompt, completion) for prompt in _PROMPTS for completion in ("of France", "Berlin", "the people")
        )
    ]


def _plain(report: Any) -> list[Any]:
    """What a report says of each query, to be compared."""
    return [
        (one.loss, one.missed, *([(r.row, r.example_id, r.influence) for r in part] for part in parts))
        for one in report.results
        for parts in [(one.proponents, one.opponents)]
    ]


def query(out: str, reranked: int = 40, exact: bool = False, workers: Any = None) -> list[Any]:
    """Ask an index, ranking some of the candidates again, or all of them exactly."""
    from trackstar.attribution.answering import answer_queries
    from trackstar.workers.protocol import THIS_PROCESS

    options: dict[str, Any] = {"exact": True} if exact else {"reranked": reranked}
    return _plain(
        answer_queries(
            out, _questions(), k=7, batch_tokens=256, workers=workers or THIS_PROCESS, progress=False, **options
        )
    )


def stream(setting: Setting, kept: str) -> list[Any]:
    """Ask the corpus itself."""
    from trackstar.attribution.streaming import stream_queries

    report = stream_queries(
        setting.model, setting.corpus, _questions(), k=7, side=8, batch_tokens=256, window_tokens=24, overlap=4,
        second_moment_examples=16, whitening_examples=SAMPLE, kept=kept, progress=False,
    )  # fmt: skip
    return _plain(report)


Operation = Callable[..., Any]


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of an index but its lock and what is derived from it, by its name; manifests without paths."""
    return {
        str(path.relative_to(folder)): without_places(path.read_bytes())
        if path.name == "manifest.json"
        else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock" and path.relative_to(folder).parts[0] != "derived"
    }
