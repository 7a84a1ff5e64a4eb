"""Plans: their numbers against independent counts, refusals under small limits, and nothing written by a dry run."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch

from capitals import QUERIES, TEXTS
from trackstar.attribution.stream_plan import StreamPlan
from trackstar.attribution.streaming import stream_queries
from trackstar.cli.commands import main
from trackstar.corpus import open_corpus
from trackstar.errors import OptionError
from trackstar.indexing import corpus_size as sizes
from trackstar.indexing import first_batch, needs, plan
from trackstar.indexing.build import build_index, index_corpus
from trackstar.indexing.defaults import LARGE_MODEL, SMALL_SIDE, default_codec, default_side
from trackstar.indexing.machine import Room
from trackstar.indexing.plan import IndexPlan, plan_index
from trackstar.indexing.settings import PAPER_SIDE, ChosenSettings, IndexSettings
from trackstar.model import language_model
from trackstar.model.language_model import LanguageModel, load_model
from trackstar.store import Index, IndexWriter, ShardContent, row_bytes

SETTINGS = ChosenSettings(side=8, second_moment="estimate", second_moment_examples=10, codec="float16")
QUICK = {"layer_blocks": 2, "progress": False}


@pytest.fixture
def model(tiny_model_folder: Path) -> LanguageModel:
    return load_model(tiny_model_folder, layer_blocks=2)


def with_settings(**changes: object) -> ChosenSettings:
    return dataclasses.replace(SETTINGS, **changes)  # pyright: ignore[reportArgumentType]


def bytes_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def listing(*folders: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder below some folders, with its size and the time of its last change."""
    found = {}
    for folder in folders:
        for path in [folder, *folder.rglob("*")]:
            status = path.stat()
            found[str(path)] = (status.st_size, status.st_mtime_ns)
    return found


@pytest.mark.parametrize("pack", [None, 16])
def test_the_corpus_is_counted_as_the_index_has_it(model: LanguageModel, tmp_path: Path, pack: int | None):
    settings = with_settings(window_tokens=16, pack=pack)
    planned = plan_index(model, [*TEXTS, "a" * 200, ""], tmp_path / "index", settings)
    index = index_corpus(model, open_corpus([*TEXTS, "a" * 200, ""]), tmp_path / "index", settings, progress=False)
    stored = [stored.example for stored in index.examples()]
    assert planned.corpus.sampled is None
    assert planned.corpus.records == len(TEXTS) + 2
    assert abs(planned.corpus.examples - len(stored)) <= (0 if pack is None else 1)
    tokens = sum(len(example.token_ids) for example in stored)
    assert planned.corpus.tokens == tokens if pack is None else abs(planned.corpus.tokens - tokens) <= 32
    assert planned.dimensions == index.dimensions == planned.blocks * 64
    assert f"{planned.corpus.examples:,} examples with {planned.corpus.tokens:,} tokens (counted)" in str(planned)


def test_a_large_corpus_is_extrapolated_from_places_all_over_it(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sizes, "_COUNTED_RECORDS", 100)
    monkeypatch.setattr(sizes, "_SPANS", 5)
    monkeypatch.setattr(sizes, "_SPAN_RECORDS", 20)
    file = tmp_path / "corpus.jsonl"
    # Texts grow from one end to the other, so that the beginning alone would be far off.
    file.write_text("".join(json.dumps({"text": "city " * (2 + n // 10)}) + "\n" for n in range(1000)))
    planned = plan_index(model, str(file), tmp_path / "index", SETTINGS)
    expected = plan_index(model, [*(("city " * (2 + n // 10)) for n in range(1000))], tmp_path / "index", SETTINGS)
    monkeypatch.setattr(sizes, "_COUNTED_RECORDS", 10_000)
    counted = plan_index(model, str(file), tmp_path / "index", SETTINGS)
    assert planned.corpus.sampled == 100
    assert (planned.corpus.records, counted.corpus.sampled) == (1000, None)
    assert planned.corpus.tokens == pytest.approx(counted.corpus.tokens, rel=0.05)
    assert expected.corpus.tokens == planned.corpus.tokens
    assert "(from 100 of the records)" in str(planned)


@pytest.mark.parametrize(
    ("codec", "whitening_examples", "moment"),
    [("float32", 1000, "none"), ("float16", 1000, "estimate"), ("1-bit", 9, "estimate"), ("int8", 1000, "none")],
)
def test_disk_is_what_the_index_takes(
    model: LanguageModel, tmp_path: Path, codec: str, whitening_examples: int, moment: str,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    settings = with_settings(codec=codec, whitening_examples=whitening_examples, second_moment=moment)
    data = [*TEXTS] * 40
    out = tmp_path / "index"
    most = 0
    finish = IndexWriter.finish

    def finishing(writer: IndexWriter, **options: int) -> object:
        nonlocal most
        most = max(most, bytes_of(out))
        return finish(writer, **options)

    monkeypatch.setattr(IndexWriter, "finish", finishing)
    planned = plan_index(model, data, out, settings)
    index_corpus(model, open_corpus(data), out, settings, progress=False)
    # Headers, checksums and the manifest of a small index are a few kilobytes.
    assert 0 <= bytes_of(out) - planned.stored < 0.03 * planned.stored + 40_000
    assert most - planned.stored - planned.temporary < 0.03 * most + 40_000
    assert (planned.temporary > 0) == settings.whitened
    assert planned.stored > len(data) * row_bytes(settings.codec, planned.dimensions, planned.blocks)


def test_r_train_and_v_are_said_as_they_are_computed(model: LanguageModel, tmp_path: Path):
    whole = plan_index(model, TEXTS, tmp_path / "index", with_settings(codec="1-bit"))
    sample = plan_index(model, TEXTS, tmp_path / "index", with_settings(codec="1-bit", whitening_examples=9))
    projected = plan_index(model, TEXTS, tmp_path / "index", with_settings(second_moment="none"))
    assert "R_train: of all examples, which are no more than 16,384" in whole.lines()[4]
    assert "R_train: of a sample of 9 examples, in a first pass" in sample.lines()[4]
    assert projected.lines()[4].endswith("R_train: of all examples")
    assert "V: factored, estimated from 10 examples" in whole.lines()[3]
    assert projected.lines()[3].endswith("V: none")
    assert [stage.name for stage in sample.needs.stages] == ["V", "first pass", "whitening", "rows"]
    assert [stage.name for stage in projected.needs.stages] == ["rows"]


def test_time_follows_the_tokens_of_a_measured_batch(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(first_batch, "_FEW_OPERATIONS", 0)
    monkeypatch.setattr(first_batch, "_run", lambda _projector, batch: (0.25 * len(batch), 3 << 20))
    rates = first_batch.Rates(single=1e12, double=1e12, moved=1e12)
    monkeypatch.setattr(first_batch, "measured_rates", lambda _device: rates)
    planned = plan_index(model, TEXTS * 10, tmp_path / "index", SETTINGS)
    batch = planned.needs.batch
    assert batch is not None
    assert batch.seconds == 0.25 * batch.examples
    per_token = batch.seconds / batch.tokens
    of_v, rows = planned.needs.stages
    assert rows.seconds == pytest.approx(per_token * planned.corpus.tokens, rel=1e-3)
    assert of_v.seconds == pytest.approx(1.3 * per_token * 10 * planned.corpus.tokens / planned.corpus.examples)
    assert planned.needs.seconds == pytest.approx((of_v.seconds or 0) + (rows.seconds or 0))
    # At most a second, or 2% of the work, is spent on the batch.
    assert batch.seconds <= max(1.0, 0.02 * (planned.needs.seconds or 0) * 1.1)
    assert f"from a first batch of {batch.tokens} tokens" in str(planned)


def test_a_measured_batch_leaves_the_gradients_as_they_are(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    build_index(str(tiny_model_folder), TEXTS, tmp_path / "quick", side=8, second_moment="none", **QUICK)
    monkeypatch.setattr(first_batch, "_FEW_OPERATIONS", 0)
    build_index(str(tiny_model_folder), TEXTS, tmp_path / "measured", side=8, second_moment="none", **QUICK)
    shards = sorted(file.relative_to(tmp_path / "quick") for file in (tmp_path / "quick" / "shards").iterdir())
    assert shards
    for shard in shards:
        assert (tmp_path / "quick" / shard).read_bytes() == (tmp_path / "measured" / shard).read_bytes()


def test_little_work_is_not_measured(model: LanguageModel, tmp_path: Path):
    planned = plan_index(model, TEXTS, tmp_path / "index", SETTINGS)
    assert planned.needs.batch is None
    assert planned.needs.seconds is None
    assert planned.lines()[-1] == "  time: not measured for so little work"


def test_too_little_memory_is_refused_before_anything_is_written(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(needs, "available_memory", lambda: Room(amount=1000, limit="a test's limit"))
    with pytest.raises(OptionError, match=r"`batch_tokens`: .* 1\.0 KiB more available \(a test's limit\); .*`side`"):
        build_index(str(tiny_model_folder), TEXTS, tmp_path / "index", side=8, **QUICK)
    assert list(tmp_path.iterdir()) == []
    many = [f"{text} {number}" for number in range(15) for text in TEXTS]  # enough for square matrices
    with pytest.raises(OptionError, match=r"^`side`: expected work that fits into memory"):
        build_index(str(tiny_model_folder), many, tmp_path / "index", side=32, **QUICK)


def test_too_little_disk_is_refused_before_anything_is_written(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(plan, "free_disk", lambda _path: 2048)
    with pytest.raises(OptionError, match=r"`out`: .* 2\.0 KiB free .*another folder, a `codec`.*`side` or a `limit`"):
        build_index(str(tiny_model_folder), TEXTS, tmp_path / "index", side=8, **QUICK)
    assert list(tmp_path.iterdir()) == []


def test_the_plan_of_a_begun_index_says_what_is_left(
    tiny_model_folder: Path, model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = with_settings(codec="1-bit", shard_examples=5)

    class StopError(Exception):
        pass

    def stopping(writer: IndexWriter, content: ShardContent) -> object:
        if len(writer.shards_done) == 2:
            raise StopError
        return write(writer, content)

    write = IndexWriter.write_shard
    whole = plan_index(model, TEXTS, tmp_path / "index", settings)
    monkeypatch.setattr(IndexWriter, "write_shard", stopping)
    with pytest.raises(StopError):
        index_corpus(model, open_corpus(TEXTS), tmp_path / "index", settings, progress=False)
    monkeypatch.setattr(IndexWriter, "write_shard", write)
    begun = plan_index(model, TEXTS, tmp_path / "index", settings)
    assert begun.begun == plan.Begun(examples=10, sampled=24, whitened=True, complete=False)
    assert [stage.name for stage in begun.needs.stages] == ["rows"]
    assert begun.lines()[-1].endswith("; 10 examples are done; 24 of the first pass are done")
    assert begun.written == bytes_of(tmp_path / "index")
    assert begun.needs.stages[0].tokens <= whole.needs.stages[-1].tokens + 14 * whole.corpus.tokens / 24
    index_corpus(model, open_corpus(TEXTS), tmp_path / "index", settings, progress=False)
    done = plan_index(model, TEXTS, tmp_path / "index", settings)
    assert str(done) == f"plan: {tmp_path / 'index'} is complete, with 24 examples; nothing is left to do"
    done.check()


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    file = tmp_path / "corpus.jsonl"
    file.write_text("".join(json.dumps({"id": str(n), "text": text}) + "\n" for n, text in enumerate(TEXTS)))
    return file


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert isinstance(stop.value.code, int)
    return stop.value.code


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    tiny_model_folder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    before = listing(tmp_path, tiny_model_folder)
    options = ("--model", str(tiny_model_folder), "--data", str(corpus), "--out", str(tmp_path / "index"))
    assert run("index", *options, "--side", "8", "--layer-blocks", "2", "--dry-run") == 0
    shown, notes = capsys.readouterr()
    assert listing(tmp_path, tiny_model_folder) == before
    assert shown.splitlines()[0].startswith("plan: index 24 records for ")
    assert [line.split(":")[0] for line in shown.splitlines()[1:]] == [
        "  corpus", "  rows", "  default", "  default", "  V", "  R_train", "  memory", "  disk", "  time",
    ]  # fmt: skip
    assert [line.split(":")[0] for line in notes.splitlines()] == ["device"]


def test_a_run_prints_the_plan_of_its_dry_run(
    tiny_model_folder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    options = ("--model", str(tiny_model_folder), "--data", str(corpus), "--out", str(tmp_path / "index"))
    chosen = ("--side", "8", "--layer-blocks", "2")
    assert run("index", *options, *chosen, "--dry-run") == 0
    planned = capsys.readouterr().out.splitlines()
    assert run("index", *options, *chosen) == 0
    notes = capsys.readouterr().err.splitlines()
    places = [notes.index(line) for line in planned if not line.startswith(("  memory", "  disk"))]
    assert places == sorted(places)


def test_a_dry_run_that_does_not_fit_is_an_error(
    tiny_model_folder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setattr(plan, "free_disk", lambda _path: 2048)
    options = ("--model", str(tiny_model_folder), "--data", str(corpus), "--out", str(tmp_path / "index"))
    assert run("index", *options, "--side", "8", "--layer-blocks", "2", "--dry-run") == 1
    shown, error = capsys.readouterr()
    assert "  time: " in shown
    device, error = error.splitlines()
    assert device.startswith("device: ")
    assert error.startswith("trackstar: --out: ")
    assert "--codec" in error
    assert "--side" in error
    assert "--limit" in error


def test_a_plan_is_frozen_and_holds_numbers(model: LanguageModel, tmp_path: Path):
    planned = plan_index(model, TEXTS, tmp_path / "index", SETTINGS)
    assert isinstance(planned, IndexPlan)
    with pytest.raises(dataclasses.FrozenInstanceError):
        planned.stored = 0  # pyright: ignore[reportAttributeAccessIssue]
    assert planned.needs.memory > planned.needs.used > sum(p.numel() for p in model.module.parameters()) * 4
    assert os.listdir(tmp_path) == []
    assert torch.is_grad_enabled()


def test_a_dry_run_of_a_stream_prints_its_plan_and_writes_nothing(
    tiny_model_folder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    before = listing(tmp_path, tiny_model_folder)
    options = (
        "--model",
        str(tiny_model_folder),
        "--data",
        str(corpus),
        "--prompt",
        "Rome is in",
        "--completion",
        "Italy",
    )
    assert run("query", *options, "--side", "8", "--out", "answers.jsonl", "--dry-run") == 0
    shown = capsys.readouterr().out.splitlines()
    assert listing(tmp_path, tiny_model_folder) == before
    assert shown[0].startswith("plan: stream 24 records through ")
    assert shown[0].endswith(" against 1 queries")
    assert "24 examples" in shown[1]
    assert [line.split(":")[0] for line in shown[1:]] == [
        "  corpus", "  gradients", "  V", "  R_train", "  memory", "  time",
    ]  # fmt: skip
    assert run("query", str(tmp_path / "index"), "--prompt", "a", "--completion", "b", "--dry-run") == 1
    assert "--dry-run: only with --data" in capsys.readouterr().err


def test_a_stream_is_refused_before_it_begins_if_memory_does_not_suffice(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    options = {"side": 8, "second_moment_examples": 20, "progress": False}
    planned: list[StreamPlan] = []
    report = stream_queries(str(tiny_model_folder), TEXTS, QUERIES, k=2, on_plan=planned.append, **options)  # pyright: ignore[reportArgumentType]
    assert planned[0].corpus.examples == report.candidates == len(TEXTS)
    assert planned[0].queries == len(QUERIES)
    assert planned[0].sample == len(TEXTS)
    assert [stage.name for stage in planned[0].needs.stages] == ["V", "R_train", "whitening", "streaming"]
    assert "plan: " not in capfd.readouterr().err
    monkeypatch.setattr(needs, "available_memory", lambda: Room(amount=1000, limit="a test's limit"))
    with pytest.raises(OptionError, match=r"more available \(a test's limit\)"):
        stream_queries(str(tiny_model_folder), TEXTS, QUERIES, k=2, **options)  # pyright: ignore[reportArgumentType]
    assert "plan: stream 24 records" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("parameters", "examples", "side"),
    [
        (2_000_000, 40, SMALL_SIDE),
        (2_000_000, PAPER_SIDE**2, SMALL_SIDE),
        (2_000_000, PAPER_SIDE**2 + 1, PAPER_SIDE),
        (LARGE_MODEL - 1, 40, SMALL_SIDE),
        (LARGE_MODEL, 40, PAPER_SIDE),
    ],
)
def test_the_side_follows_the_model_and_the_corpus(parameters: int, examples: int, side: int):
    assert default_side(parameters, examples)[0] == side


def test_rows_are_wide_until_they_take_a_gibibyte():
    row = row_bytes("float16", 16 * 64**2, 16)
    most = 2**30 // row
    assert default_codec(16, 64, most)[0] == "float16"
    assert default_codec(16, 64, most + 1)[0] == "1-bit"
    assert default_codec(16, 64, most + 1, projected=True)[0] == "float16"
    assert default_codec(16, 63, 10 * most)[0] == "float16"


def test_an_index_at_defaults_is_what_its_plan_says(model: LanguageModel, tmp_path: Path):
    planned = plan_index(model, TEXTS, tmp_path / "index")
    index = build_index(model, TEXTS, tmp_path / "index", progress=False)
    found = index.manifest
    assert (planned.settings.side, planned.settings.codec) == (found.projection.side, found.codec) == (32, "float16")
    assert planned.settings.coordinates == found.coordinates == "projected"
    assert [why.split()[0].rstrip(",") for why in planned.defaults] == ["side", "float16", "projected"]
    assert plan_index(model, TEXTS, tmp_path / "other", SETTINGS).defaults == ()


@pytest.mark.parametrize(
    ("settings", "coordinates"),
    [
        (IndexSettings(side=64), "whitened"),
        (IndexSettings(side=32), "projected"),
        (IndexSettings(side=32, damping=0.1), "whitened"),
        (IndexSettings(side=64, coordinates="projected"), "projected"),
        (IndexSettings(side=64, codec="float16"), "projected"),
        (IndexSettings(codec="int8"), "whitened"),
        (IndexSettings(preset="paper"), "projected"),
    ],
)
def test_coordinates_that_are_left_to_choose(
    model: LanguageModel, tmp_path: Path, settings: IndexSettings, coordinates: str
):
    assert plan_index(model, TEXTS, tmp_path / "index", settings).settings.coordinates == coordinates


def test_the_paper_s_preset_is_the_paper_to_the_letter(model: LanguageModel, tmp_path: Path):
    chosen = plan_index(model, TEXTS, tmp_path / "index", IndexSettings(preset="paper")).settings
    assert (chosen.side, chosen.codec, chosen.coordinates) == (64, "float32", "projected")
    assert (chosen.projection, chosen.output, chosen.second_moment_kind) == ("two-sided", "loss", "factored")
    assert IndexSettings(preset="paper", side=64).codec == "float32"
    for other in ({"side": 32}, {"codec": "1-bit"}, {"coordinates": "whitened"}, {"output": "margin"}):
        (name,) = other
        with pytest.raises(OptionError, match=f'`{name}`: expected .* with `preset="paper"`, found'):
            IndexSettings(preset="paper", **other)  # pyright: ignore[reportArgumentType]


def test_an_index_that_is_begun_keeps_its_side_and_codec(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Also where the rule would choose others now, as on another machine or in a later version."""
    out = tmp_path / "index"
    finished = build_index(model, TEXTS, out, side=16, codec="int8", progress=False)
    planned = plan_index(model, TEXTS, out)
    assert (planned.settings.side, planned.settings.codec) == (16, "int8")
    assert build_index(model, TEXTS, out, progress=False).manifest == finished.manifest

    monkeypatch.setattr(IndexWriter, "write_shard", _interrupted)
    other = tmp_path / "other"
    with pytest.raises(KeyboardInterrupt):
        build_index(model, TEXTS, other, side=16, codec="int8", coordinates="whitened", progress=False)
    monkeypatch.undo()
    assert not (other / "manifest.json").exists()  # only its first pass is begun, in float16
    assert plan_index(model, TEXTS, other).settings.side == 16
    resumed = build_index(model, TEXTS, other, codec="int8", progress=False)
    assert resumed.manifest.identity_digest() == finished.manifest.identity_digest()


def test_a_machine_with_little_memory_gets_the_largest_side_that_fits(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def room(settings: IndexSettings, amount: int, share: str | None = None) -> IndexPlan:
        monkeypatch.setattr(needs, "available_memory", lambda: Room(amount=amount, limit="this test's limit"))
        return plan_index(model, TEXTS, tmp_path / "index", settings, share=share)

    def of_side(side: int) -> int:
        return room(IndexSettings(side=side, codec="float16"), 2**40).needs.more

    planned = room(IndexSettings(codec="float16"), of_side(16))
    assert planned.settings.side == 16
    assert planned.needs.suffice
    assert planned.defaults[0].startswith("side 16, as 24 needs ")
    of_all = room(IndexSettings(), room(IndexSettings(side=16), 2**40).needs.more)
    assert of_all.settings.coordinates == "projected"
    assert of_all.defaults[-1].endswith(f"at side {of_all.settings.side}")  # chosen for the side that fits
    assert not room(IndexSettings(codec="float16"), 1).needs.suffice
    for settings, share in ((IndexSettings(side=32, codec="float16"), None), (IndexSettings(codec="float16"), "1/2")):
        kept = room(settings, of_side(16), share)
        assert kept.settings.side == 32
        with pytest.raises(OptionError, match="expected work that fits into memory"):
            kept.check()


def test_a_streamed_corpus_has_the_side_of_an_index_of_it(tiny_model_folder: Path):
    planned: list[StreamPlan] = []
    stream_queries(str(tiny_model_folder), TEXTS, QUERIES, k=2, on_plan=planned.append, progress=False)
    assert planned[0].settings.side == SMALL_SIDE
    assert "side 32" in str(planned[0])


def test_a_ranking_at_defaults_is_that_of_the_paper_s_form(model: LanguageModel, tmp_path: Path):
    """Whitened float16 rows, projected float16 rows and float32 rows of one side give one ranking."""
    from trackstar.attribution.answering import answer_queries

    rankings = []
    for name, settings in (
        ("default", {}), ("whitened", {"coordinates": "whitened"}), ("float32", {"side": 32, "codec": "float32"}),
    ):  # fmt: skip
        index = build_index(model, TEXTS, tmp_path / name, progress=False, **settings)  # pyright: ignore[reportArgumentType]
        assert isinstance(index, Index)
        report = answer_queries(index, QUERIES, model=model, k=3, mixing=0.0, progress=False)
        rankings.append([[ranked.influence for ranked in result.proponents] for result in report.results])
    assert torch.allclose(torch.tensor(rankings[0]), torch.tensor(rankings[2]), atol=2e-4)
    assert torch.allclose(torch.tensor(rankings[1]), torch.tensor(rankings[2]), atol=2e-4)


def _interrupted(*_arguments: object, **_options: object) -> None:
    raise KeyboardInterrupt


def test_batches_of_a_wide_model_are_as_small_as_its_activations_ask_for(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
):
    of_a_token = 4 * sum(matrix.rows + matrix.columns for matrix in model.matrices)
    assert model.batch_budget(2048) == 2048
    monkeypatch.setattr(language_model, "_ACTIVATIONS", 100 * of_a_token)
    assert model.batch_budget(2048) == 100
    assert model.batch_budget(64) == 64
    monkeypatch.setattr(language_model, "_ACTIVATIONS", 1)
    weights = sum(parameter.nbytes for parameter in model.module.parameters())
    assert model.batch_budget(10**9) == max(1, weights // 4 // of_a_token)
    monkeypatch.setattr(LanguageModel, "device", torch.device("cuda"))
    assert model.batch_budget(2048) == 2048
