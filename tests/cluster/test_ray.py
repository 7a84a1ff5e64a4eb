"""A cluster's workers give the results of one process, bit for bit, even if workers fail."""

import dataclasses
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from cluster_work import Dies, DiesOnce, Fails, Overflows, Slow, is_ray, rows
from small_index import index_bytes, index_files
from tiny_models import save_tiny_model
from trackstar.attribution.answering import answer_queries
from trackstar.attribution.results import QueryReport
from trackstar.corpus import Query, TokenizedExample, tokenize_query
from trackstar.errors import ClusterError, GradientError, ModelError, OptionError, TrackstarError
from trackstar.gradients.projector import projected
from trackstar.indexing.build import build_index
from trackstar.model.language_model import LanguageModel, load_model
from trackstar.store import Index
from trackstar.workers import RayWorkers, ray_workers
from trackstar.workers.index_model import second_moment_of_index
from trackstar.workers.protocol import THIS_PROCESS, Workers
from trackstar.workers.setups import GradientSetup

# Ray leaves sockets and files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

WORDS = ["Paris", "is", "the", "capital", "of", "France", "Berlin", "Germany", "people", "speak"]
SETTINGS: dict[str, Any] = {
    "side": 8, "shard_examples": 40, "batch_tokens": 128, "second_moment_examples": 70, "progress": False,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "whitened": {"codec": "1-bit", "whitening_examples": 100},
    "projected": {"codec": "float16"},
}
QUERIES = [
    Query(query_id=f"q{n}", prompt=" ".join(WORDS[n % 7 : n % 7 + 2 + n % 3]), completion=WORDS[n % 10])
    for n in range(20)
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = random.Random(0)
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    texts = [" ".join(generator.choices(WORDS, k=generator.randint(0, 14))) for _ in range(300)]
    path.write_text("".join(json.dumps({"id": f"e{n}", "text": text}) + "\n" for n, text in enumerate(texts)))
    return path


@pytest.fixture(scope="module")
def plain(model: LanguageModel, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Indexes built by this process alone."""
    torch.set_num_threads(1)
    folders = {kind: tmp_path_factory.mktemp("plain") / kind for kind in KINDS}
    for kind, folder in folders.items():
        build_index(model, corpus, folder, **SETTINGS, **KINDS[kind])
    return folders


def copy_of(index: Path, out: Path) -> Path:
    """A copy without the `derived` folder, as if it had not been queried."""
    for name, content in index_files(index).items():
        if not name.startswith("derived/"):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes(content)
    return out


def made(index: Path) -> dict[str, bytes]:
    return {name: content for name, content in index_bytes(index).items() if not name.startswith("derived/")}


def answers(report: QueryReport) -> list[Any]:
    """All numbers of a report, to the last bit."""
    return [(r.loss.hex(), r.missed, r.proponents, r.opponents) for r in report.results] + [
        report.damping,
        report.mixing,
    ]


def worker_processes() -> list[psutil.Process]:
    """The processes of `Worker` actors."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[0].startswith("ray::Worker"):
                found.append(process)
        except (psutil.Error, IndexError):
            continue
    return found


# First, while no cluster runs: `auto` would find the one that the fixture of the tests below starts.


@pytest.mark.parametrize(
    "address",
    [
        "auto",
        "127.0.0.1:9",
        "ray://127.0.0.1:9",
        pytest.param("nowhere.invalid:6379", marks=pytest.mark.slow),
        pytest.param("x", marks=pytest.mark.slow),
    ],
)
def test_a_cluster_that_cannot_be_reached_is_a_one_line_error(address: str, tmp_path: Path) -> None:
    if address == "auto" and any(map(is_ray, psutil.process_iter())):
        pytest.skip("a cluster runs here, which auto finds")
    program = (
        "import sys\nfrom trackstar.workers import RayWorkers\nfrom trackstar.errors import ClusterError\n"
        f"try:\n    RayWorkers({address!r})\nexcept ClusterError as error:\n    print(error, file=sys.stderr)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment["RAY_TMPDIR"] = str(tmp_path)
    begun = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=120, check=False
    )
    assert result.stderr.startswith("`address`: expected auto, local, HOST:PORT or a ray:// URL of a running cluster, ")
    assert f", found {address} (" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.returncode == 0
    assert time.monotonic() - begun < 40


# The same bits


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_is_that_of_one_process(
    workers: RayWorkers, model: LanguageModel, corpus: Path, plain: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    build_index(model, corpus, tmp_path, workers=workers, **SETTINGS, **KINDS[kind])
    assert made(tmp_path) == made(plain[kind])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [{}, {"reranked": 0}, {"exact": True}, {"task": QUERIES[:9], "reranked": 40}],
    ids=["default", "store alone", "exact", "task"],
)
def test_answers_are_those_of_one_process(
    workers: RayWorkers, model: LanguageModel, plain: dict[str, Path], kind: str, options: Any, tmp_path: Path
) -> None:
    given = {"model": model, "k": 7, "progress": False, "batch_tokens": 128, **options}
    alone = answer_queries(copy_of(plain[kind], tmp_path / "one"), QUERIES, **given)
    together = answer_queries(copy_of(plain[kind], tmp_path / "many"), QUERIES, workers=workers, **given)
    assert answers(together) == answers(alone)


def test_one_question_about_an_index_named_from_here_has_the_answer_of_one_process(
    workers: RayWorkers, model: LanguageModel, plain: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few queries of float codecs are scanned by other code than many, and workers run in a different folder."""
    given = {"model": model, "k": 7, "progress": False, "batch_tokens": 128}
    alone = answer_queries(copy_of(plain["projected"], tmp_path / "one"), QUERIES[:1], **given)
    copy_of(plain["projected"], tmp_path / "many")
    monkeypatch.chdir(tmp_path)
    assert answers(answer_queries("many", QUERIES[:1], workers=workers, **given)) == answers(alone)


def test_this_process_keeps_its_sigterm_handler(workers: RayWorkers) -> None:
    """Ray replaces it while it starts."""
    assert not getattr(signal.getsignal(signal.SIGTERM), "__module__", "").startswith("ray")


@pytest.mark.slow
def test_another_number_of_workers_changes_nothing(
    workers: RayWorkers, model: LanguageModel, corpus: Path, plain: dict[str, Path], tmp_path: Path
) -> None:
    workers._pool.close()
    with RayWorkers("auto", workers=1) as one:  # of the same cluster
        build_index(model, corpus, tmp_path / "index", workers=one, **SETTINGS, **KINDS["whitened"])
        given: dict[str, Any] = {"model": model, "k": 7, "progress": False, "batch_tokens": 128}
        alone = answer_queries(copy_of(plain["whitened"], tmp_path / "one"), QUERIES, **given)
        together = answer_queries(tmp_path / "index", QUERIES, workers=one, **given)
        assert len(one._pool._members) == 1
    assert made(tmp_path / "index") == made(plain["whitened"])
    assert answers(together) == answers(alone)


@pytest.fixture
def setup(plain: dict[str, Path]) -> GradientSetup:
    index = Index.open(plain["projected"])
    return GradientSetup(manifest=index.manifest, second_moment=second_moment_of_index(index), batch_tokens=128)


@pytest.fixture
def examples(model: LanguageModel) -> list[TokenizedExample]:
    return [tokenize_query(query, model.tokenizer, window_tokens=64) for query in QUERIES]


def parts_of(examples: list[TokenizedExample]) -> list[list[TokenizedExample]]:
    return [examples[first : first + 3] for first in range(0, len(examples), 3)]


def test_both_kinds_of_workers_give_the_same_gradients_in_the_parts_order(
    workers: RayWorkers, model: LanguageModel, setup: GradientSetup, examples: list[TokenizedExample]
) -> None:
    parts = parts_of(examples)
    found = []
    for some in (THIS_PROCESS, workers):
        assert isinstance(some, Workers)
        advanced: list[int] = []
        found.append(list(some.gradients(model, setup, projected, iter(parts), advance=advanced.append)))
        assert sum(advanced) == len(examples)
    for mine, theirs in zip(*found, strict=True):
        assert torch.equal(mine[0], theirs[0])
        assert torch.equal(mine[1], theirs[1])
    assert list(workers.gradients(model, setup, projected, [])) == []


@pytest.mark.slow
def test_a_worker_loads_another_model_of_the_same_weights(
    workers: RayWorkers, tiny_model_folder: Path, corpus: Path, tmp_path: Path
) -> None:
    """With its layers pooled into another number of blocks."""
    for blocks in (2, 3):
        other = load_model(tiny_model_folder, layer_blocks=blocks)
        settings = {**SETTINGS, "codec": "float16", "limit": 20}
        build_index(other, corpus, tmp_path / f"one{blocks}", **settings)
        build_index(other, corpus, tmp_path / f"many{blocks}", workers=workers, **settings)
        assert made(tmp_path / f"many{blocks}") == made(tmp_path / f"one{blocks}")


# Parts and resources


def test_parts_are_not_taken_long_before_they_can_be_computed(
    workers: RayWorkers, model: LanguageModel, setup: GradientSetup
) -> None:
    taken = 0

    def source() -> Iterator[int]:
        nonlocal taken
        for number in range(30):
            taken += 1
            yield number

    given = []
    for number in workers.gradients(model, setup, Slow(0.02), source()):
        given.append(number)
        assert taken <= len(given) + 2 * 3
    assert given == list(range(30))


def test_an_abandoned_iterator_releases_its_parts(
    workers: RayWorkers, model: LanguageModel, setup: GradientSetup
) -> None:
    for _ in range(3):
        given = workers.gradients(model, setup, Slow(0.1), iter(range(100)))
        assert next(given) == 0
        given.close()  # pyright: ignore[reportAttributeAccessIssue]
    begun = time.monotonic()
    assert list(workers.gradients(model, setup, Slow(0), iter(range(5)))) == list(range(5))
    assert time.monotonic() - begun < 5


def test_resources_are_free_once_closed(workers: RayWorkers, model: LanguageModel, setup: GradientSetup) -> None:
    import ray

    assert list(workers.gradients(model, setup, Slow(0), [1])) == [1]
    workers._pool.close()
    until = time.monotonic() + 20
    while ray.available_resources().get("CPU", 0) < ray.cluster_resources()["CPU"] and time.monotonic() < until:
        time.sleep(0.1)
    assert ray.available_resources()["CPU"] == ray.cluster_resources()["CPU"]
    with RayWorkers("auto", workers=1) as second:
        assert list(second.gradients(model, setup, Slow(0), [1])) == [1]
    assert ray.is_initialized(), "only the object that connected disconnects"


# Interruptions


class InterruptedRunError(Exception):
    """An error that is not a `TrackstarError`."""


def test_an_interrupted_index_resumes(
    workers: RayWorkers, model: LanguageModel, corpus: Path, plain: dict[str, Path], tmp_path: Path
) -> None:
    from trackstar import store

    write = store.IndexWriter.write_shard

    def interrupted(self: store.IndexWriter, content: store.ShardContent) -> store.Shard:
        if len(self.shards_done) == 2:
            raise InterruptedRunError
        return write(self, content)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(store.IndexWriter, "write_shard", interrupted)
        with pytest.raises(InterruptedRunError):
            build_index(model, corpus, tmp_path, workers=workers, **SETTINGS, **KINDS["projected"])
    assert len(list((tmp_path / "shards").iterdir())) == 2
    build_index(model, corpus, tmp_path, workers=workers, **SETTINGS, **KINDS["projected"])
    assert made(tmp_path) == made(plain["projected"])


def killing(seconds: Callable[[], float], stop: threading.Event, killed: list[int]) -> None:
    while not stop.wait(seconds()):
        for process in worker_processes()[:1]:
            try:
                process.kill()
                killed.append(process.pid)
            except psutil.Error:
                continue


@pytest.fixture
def at_risk() -> Iterator[list[int]]:
    """Kill a worker every few seconds while the test runs."""
    generator = random.Random(time.time_ns())
    stop, killed = threading.Event(), list[int]()
    thread = threading.Thread(target=killing, args=(lambda: generator.uniform(0.5, 6), stop, killed))
    thread.start()
    yield killed
    stop.set()
    thread.join()


@pytest.mark.slow
def test_workers_are_killed_at_random_moments(
    workers: RayWorkers, model: LanguageModel, corpus: Path, plain: dict[str, Path], tmp_path: Path, at_risk: list[int]
) -> None:
    given: dict[str, Any] = {"model": model, "k": 7, "progress": False, "batch_tokens": 128}
    alone = answer_queries(copy_of(plain["whitened"], tmp_path / "one"), QUERIES, **given)
    for turn in itertools.count():
        out = tmp_path / f"turn{turn}"
        build_index(model, corpus, out, workers=workers, **SETTINGS, **KINDS["whitened"])
        assert made(out) == made(plain["whitened"])
        assert answers(answer_queries(out, QUERIES, workers=workers, **given)) == answers(alone)
        if len(at_risk) >= 4:
            break


def test_a_killed_workers_parts_go_to_others(
    workers: RayWorkers, model: LanguageModel, setup: GradientSetup, tmp_path: Path
) -> None:
    notes: list[str] = []
    found = list(workers.gradients(model, setup, DiesOnce(tmp_path / "died"), iter(range(12)), note=notes.append))
    assert found == list(range(12))
    assert any(note.startswith("a worker was lost (") and "parts go to them" in note for note in notes)
    assert all("\n" not in note for note in notes)


@pytest.mark.slow
def test_a_part_that_no_worker_survives_is_an_error(
    workers: RayWorkers, model: LanguageModel, setup: GradientSetup
) -> None:
    with pytest.raises(
        ClusterError, match=r"^part \d+ was given to 5 workers, and all were lost \(.*\); try"
    ) as caught:
        list(workers.gradients(model, setup, Dies(), iter(range(4))))
    assert "\n" not in str(caught.value)
    assert list(workers.gradients(model, setup, Slow(0), [1])) == [1]


# Errors


@pytest.mark.parametrize("error", [GradientError, OptionError, ZeroDivisionError])
def test_a_parts_error_is_the_callers(
    workers: RayWorkers, model: LanguageModel, setup: GradientSetup, error: type[Exception]
) -> None:
    given = workers.gradients(model, setup, Fails(error), iter(range(50)))
    with pytest.raises(error, match=r"^e7: its loss is not finite$"):
        list(given)
    assert list(workers.gradients(model, setup, Slow(0), [1])) == [1]


def test_an_example_without_a_finite_gradient_is_named(
    workers: RayWorkers, model: LanguageModel, setup: GradientSetup, examples: list[TokenizedExample]
) -> None:
    with torch.no_grad():
        weight = next(iter(model.module.parameters()))
        original = weight.clone()
        weight.fill_(3e38)
    try:
        with pytest.raises(GradientError) as alone:
            list(THIS_PROCESS.gradients(model, setup, projected, [examples]))
    finally:
        with torch.no_grad():
            weight.copy_(original)
    with pytest.raises(GradientError) as together:
        list(workers.gradients(model, setup, Overflows(), [examples]))
    assert str(together.value) == str(alone.value)


def test_a_model_that_is_not_on_the_node_is_named_with_the_node(
    workers: RayWorkers, setup: GradientSetup, tmp_path: Path, corpus: Path
) -> None:
    folder = save_tiny_model(tmp_path / "model", "llama", special_tokens="bos", seed=3)
    loaded = load_model(folder, layer_blocks=2)
    folder.rename(tmp_path / "moved")
    with pytest.raises(
        ModelError, match=r"^on node [^ ]+: .*expected the model at the same path on all of the cluster's nodes"
    ) as caught:
        build_index(loaded, corpus, tmp_path / "index", workers=workers, **SETTINGS, **KINDS["projected"])
    assert "\n" not in str(caught.value)
    save_tiny_model(folder, "llama", special_tokens="bos", seed=4)
    with pytest.raises(TrackstarError, match=r"^on node [^ ]+: .*the model's digest is .*give all nodes the same"):
        build_index(loaded, corpus, tmp_path / "index", workers=workers, **SETTINGS, **KINDS["projected"])
    with pytest.raises(OptionError, match=r"^`model`: expected one loaded from .*, found one in memory only$"):
        workers.gradients(dataclasses.replace(loaded, source="in memory"), setup, projected, [])


def test_an_index_that_is_not_on_the_node_is_named_with_the_node(
    workers: RayWorkers, plain: dict[str, Path], tmp_path: Path
) -> None:
    index = Index.open(copy_of(plain["projected"], tmp_path / "index"))
    (tmp_path / "index").rename(tmp_path / "moved")
    with pytest.raises(TrackstarError, match=r"^on node [^ ]+: .*expected the index at the same path on all of the"):
        workers.scan(index, rows)


def test_an_error_of_the_source_of_parts_is_the_callers(
    workers: RayWorkers, model: LanguageModel, setup: GradientSetup
) -> None:
    def source() -> Iterator[int]:
        yield 1
        raise InterruptedRunError

    with pytest.raises(InterruptedRunError):
        list(workers.gradients(model, setup, Slow(0), source()))
    assert list(workers.gradients(model, setup, Slow(0), [1])) == [1]


def test_ray_that_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_workers.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(
        OptionError,
        match=r"^a cluster's workers need Ray, which is not installed; pip install 'trackstar-tda\[ray\]'$",
    ):
        RayWorkers("local")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "`workers`: expected 1 or more, found 0"),
        ({"cpus": 0}, "`cpus`: expected 1 or more, found 0"),
        ({"gpus": -1.0}, "`gpus`: expected 0, a fraction of one .*, found -1"),
        ({"gpus": 1.5}, "`gpus`: expected 0, a fraction of one .*, found 1.5"),
        ({"gpus": 1e-5}, "`gpus`: expected 0, a fraction of one .*, found 1e-05"),
        ({"gpus": 65.0}, "`gpus`: expected .* or a whole number up to 64, found 65"),
    ],
)
def test_numbers_out_of_range_are_refused(options: Any, message: str) -> None:
    with pytest.raises(OptionError, match=f"^{message}$"):
        RayWorkers("local", **options)


def test_a_worker_larger_than_the_cluster_is_refused(workers: RayWorkers) -> None:
    with pytest.raises(
        ClusterError, match=r"^`address`: the nodes of the cluster auto have up to .* a worker needs 4096 and 0; pass"
    ):
        RayWorkers("auto", cpus=4096)
    with pytest.raises(ClusterError, match=r"^`address`: .* a worker needs 1 and 4; pass smaller `cpus` or `gpus`"):
        RayWorkers("auto", gpus=4.0)
