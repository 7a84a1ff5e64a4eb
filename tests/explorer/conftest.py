"""Three result files, one of them hostile, and a small index, served for all tests of the explorer's API."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from capitals import CAPITALS, TEXTS
from explorer_server import HEADERS, explorer, opened
from release_file import write_hostile_file, write_release_file
from tiny_models import TinyModelFolder
from trackstar.indexing.build import build_index
from trackstar.store import Index

COUNTRIES = list(CAPITALS)


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("results")
    return [
        write_release_file(folder / "one.jsonl", queries=60),
        write_release_file(folder / "two.jsonl", queries=50, candidates=7),
        write_hostile_file(folder / "hostile.jsonl"),
    ]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    lines = [
        {"id": f"e{row}", "text": text, "source": COUNTRIES[row // 4], "year": 1990 + row % 4, "none": None}
        for row, text in enumerate(TEXTS)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="session")
def index(corpus: Path, tiny_model_folders: TinyModelFolder, tmp_path_factory: pytest.TempPathFactory) -> Index:
    out = tmp_path_factory.mktemp("index") / "index"
    model = tiny_model_folders("llama", "bos")
    return build_index(
        model, str(corpus), out, side=4, layer_blocks=2, codec="float32", second_moment_examples=8, progress=False
    )


@pytest.fixture(scope="session")
def address(results: list[Path], index: Index, corpus: Path) -> Iterator[str]:
    with explorer(results, opened(index, corpus)) as served:
        yield served


@pytest.fixture
def client(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, headers=HEADERS, timeout=60) as opened_client:
        yield opened_client
