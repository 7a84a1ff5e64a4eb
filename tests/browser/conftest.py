"""A real browser for tests: Chromium, driven by Playwright. A test fails if its page reports an error."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from capitals import CAPITALS, TEXTS
from explorer_server import explorer
from release_file import HOSTILE, LONG, write_hostile_file, write_kinds_file, write_release_file
from tiny_models import TinyModelFolder
from trackstar.attribution.attributor import Attributor
from trackstar.corpus import open_corpus
from trackstar.explorer.live import LiveIndex
from trackstar.indexing.build import build_index
from trackstar.model.language_model import load_model

QUERIES = 5415
# Keep Chromium's background services off the network, which tests do not have.
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync",
    "--disable-component-update", "--no-first-run",
]  # fmt: skip


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    assert chromium, "no chromium is installed; `make test` installs it (as root), or: apt-get install chromium"
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield opened
        opened.close()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    made = browser.new_context(viewport={"width": 1440, "height": 900}, accept_downloads=True)
    made.set_default_timeout(15_000)
    yield made
    made.close()


@pytest.fixture
def page(context: BrowserContext) -> Iterator[Page]:
    """A page; an error in it, or a violation of its policy, fails the test."""
    problems: list[str] = []
    made = context.new_page()
    made.on("pageerror", lambda error: problems.append(f"error: {error}"))
    made.on("console", lambda entry: problems.append(entry.text) if entry.type in ("error", "warning") else None)
    made.on("dialog", lambda dialog: problems.append(f"dialog: {dialog.message}"))
    made.add_init_script("window.pwned = 0")
    yield made
    assert made.evaluate("window.pwned") == 0, "a text of the corpus ran"
    assert not [problem for problem in problems if "status of 404" not in problem], problems


@pytest.fixture(scope="session")
def release_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Two runs over as many queries as the release has."""
    folder = tmp_path_factory.mktemp("release")
    first = write_release_file(folder / "ours.jsonl", queries=QUERIES)
    second = write_release_file(folder / "baseline.jsonl", queries=QUERIES - 1, candidates=6)
    with explorer([first, second]) as address:
        yield address


@pytest.fixture(scope="session")
def kinds_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A line of each kind of question, and a second file that explains a wrong answer to the first one."""
    folder = tmp_path_factory.mktemp("kinds")
    wrong = {"targets_plaintext": "Elgor", "model_answer": "Elgor", "is_8b_correct": False, "groundtruth": "Monbri"}
    with explorer(
        [write_kinds_file(folder / "right.jsonl"), write_kinds_file(folder / "wrong.jsonl", [wrong])]
    ) as address:
        yield address


@pytest.fixture(scope="session")
def hostile_address(tiny_model_folders: TinyModelFolder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A result file and an index with hostile texts."""
    folder = tmp_path_factory.mktemp("hostile")
    texts = [*HOSTILE, LONG[:2000]]
    lines = [{"id": f"{text[:40]} {row}", "text": text, text[:30]: text[:60]} for row, text in enumerate(texts)]
    with explorer(
        [write_hostile_file(folder / "hostile.jsonl")], _live(folder, lines, tiny_model_folders("llama", "bos"))
    ) as address:
        yield address


@pytest.fixture(scope="session")
def live_address(tiny_model_folders: TinyModelFolder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An index of two dozen sentences about capitals, with fields."""
    folder = tmp_path_factory.mktemp("live")
    countries = list(CAPITALS)
    lines = [
        {"id": f"e{row}", "text": text, "source": countries[row // 4], "year": 1990 + row % 4}
        for row, text in enumerate(TEXTS)
    ]
    with explorer([], _live(folder, lines, tiny_model_folders("llama", "bos"))) as address:
        yield address


def _live(folder: Path, lines: Sequence[Mapping[str, object]], model: Path) -> LiveIndex:
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps(line) + "\n" for line in lines))
    index = build_index(
        model, str(corpus), folder / "index", side=4, layer_blocks=2, codec="float32", second_moment_examples=8,
        progress=False,
    )  # fmt: skip
    attributor = Attributor(index, load_model(model, layer_blocks=2), damping=0.1)
    return LiveIndex(attributor, encoder=None, corpora=[open_corpus(str(corpus))], task_queries=0)


@pytest.fixture(scope="session")
def axe() -> Callable[[Page], list[str]]:
    """Finds serious and critical accessibility problems on a page, with axe-core."""
    source = Path(__file__).resolve().parents[2] / "frontend" / "node_modules" / "axe-core" / "axe.min.js"
    assert source.exists(), f"{source}: not found; `make test` installs it, or: npm ci in frontend/"
    script = source.read_text(encoding="utf-8")

    def problems(page: Page) -> list[str]:
        page.evaluate(script)
        found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        return [
            f"{violation['id']} ({violation['impact']}): {node['target']} {node['failureSummary']}"
            for violation in found["violations"]
            if violation["impact"] in ("serious", "critical")
            for node in violation["nodes"]
        ]

    return problems
