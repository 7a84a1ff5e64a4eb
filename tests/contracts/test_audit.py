"""Audits: a change of any input is reported by name, and equal inputs elsewhere compare as equal."""

import contextlib
import copy
import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

import trackstar
from capitals import QUERIES, TEXTS
from shard_bytes import in_format_3
from tiny_models import save_tiny_model, tiny_tokenizer
from trackstar.audit.checks import AtHand
from trackstar.audit.recomputation import check_audit
from trackstar.audit.record import AUDIT_VERSION, read_audit
from trackstar.cli import framework
from trackstar.cli import trackstar as command_group
from trackstar.errors import AuditError, OptionError, TrackstarError
from trackstar.store import Index, load_manifest
from trackstar.workers.index_model import second_moment_of_index

SETTINGS = ("--side", 8, "--layer-blocks", 2, "--codec", "1-bit")


def run(*arguments: object) -> int:
    return framework.run(command_group, [str(argument) for argument in arguments])


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@dataclasses.dataclass(frozen=True)
class World:
    """A folder with all inputs of an answer, and the answer."""

    folder: Path

    @property
    def audit(self) -> Path:
        return self.folder / "results.audit.json"

    @property
    def hand(self) -> AtHand:
        return AtHand(
            index=self.folder / "index",
            model=self.folder / "model",
            data=(str(self.folder / "corpus.jsonl"),),
            queries=self.folder / "queries.jsonl",
            task=self.folder / "task.jsonl",
        )

    def outcomes(self, hand: AtHand | None = None, *, again: bool = False) -> dict[str, str]:
        report = check_audit(self.audit, self.hand if hand is None else hand, again=again, progress=False)
        found = {check.name: check.outcome for check in report.checks}
        assert len(found) == len(report.checks)
        assert report.ok == ("differs" not in found.values())
        return found


def make(folder: Path) -> World:
    save_tiny_model(folder / "model", "llama")
    write_lines(folder / "corpus.jsonl", [{"id": f"t{place}", "text": text} for place, text in enumerate(TEXTS)])
    for name, queries in (("queries", QUERIES[:4]), ("task", QUERIES)):
        records = [{"query_id": q.query_id, "prompt": q.prompt, "completion": q.completion} for q in queries]
        write_lines(folder / f"{name}.jsonl", records)
    model, corpus = folder / "model", folder / "corpus.jsonl"
    assert run("index", "--model", model, "--data", corpus, "--out", folder / "index", *SETTINGS) == 0
    return World(folder)


def ask(world: World, *options: object) -> None:
    asked = ("--queries", world.folder / "queries.jsonl", "--task", world.folder / "task.jsonl", "--top", 3)
    assert run("query", *asked, "--out", world.folder / "results.jsonl", *options) == 0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make(tmp_path_factory.mktemp("audited"))
    ask(world, "--index", world.folder / "index", "--rerank", 5)
    return world


@pytest.fixture
def world(made: World, tmp_path: Path) -> World:
    """A copy of the folder."""
    shutil.copytree(made.folder, tmp_path / "elsewhere")
    return World(tmp_path / "elsewhere")


def blake(content: bytes, size: int = 32) -> str:
    return hashlib.blake2b(content, digest_size=size).hexdigest()


def forge(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change an audit and recompute its digest."""
    fields = json.loads(path.read_text())
    change(fields)
    fields["digest"] = own_digest(fields)
    path.write_text(json.dumps(fields))


def own_digest(fields: dict[str, Any]) -> str:
    remaining = copy.deepcopy({name: value for name, value in fields.items() if name not in ("digest", "descriptive")})
    for name in fields["descriptive"]:
        *path, last = name.split(".")
        inside = [remaining]
        for part in path:
            inside = [
                each
                for value in inside
                if isinstance(value, dict) and isinstance(value.get(part), (dict, list))
                for each in (value[part] if isinstance(value[part], list) else [value[part]])
            ]
        for value in inside:
            if isinstance(value, dict):
                value.pop(last, None)
    return blake(json.dumps(remaining, separators=(",", ":"), sort_keys=True).encode())


def forge_results(world: World, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the first line of the result file, and its digest in the audit."""
    path = world.folder / "results.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    record = json.loads(lines[0])
    change(record)
    path.write_text("\n".join([json.dumps(record, ensure_ascii=False), *lines[1:]]) + "\n", encoding="utf-8")
    forge(world.audit, lambda fields: fields["results"].update(digest=blake(path.read_bytes())))


# ---- Content -----------------------------------------------------------------------------------------------------


def test_digests_are_those_of_the_files(made: World):
    fields = json.loads(made.audit.read_text())
    folder = made.folder
    assert fields["results"] == {
        "file": "results.jsonl",
        "digest": blake((folder / "results.jsonl").read_bytes()),
        "query_set": "queries",
    }
    for name, entry in (("queries", fields["queries"]), ("task", fields["question"]["task"])):
        records = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        lines = [json.dumps(list(record.values()), separators=(",", ":")) + "\n" for record in records]
        assert entry == {"count": len(records), "digest": blake("".join(lines).encode())}
    assert fields["index"]["manifest_file"] == blake((folder / "index" / "manifest.json").read_bytes())
    completion = json.loads((folder / "index" / "manifest.json").read_text())["completion"]
    assert fields["index"]["content"] == blake(json.dumps(completion, separators=(",", ":")).encode())
    weights = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(load_file(folder / "model" / "model.safetensors").items()):
        weights.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode() + tensor.numpy().tobytes())
    assert fields["made_with"]["model"]["digest"] == weights.hexdigest()
    tokenizer = Tokenizer.from_file(str(folder / "model" / "tokenizer.json")).to_str()
    assert fields["made_with"]["tokenizer"]["digest"] == blake(tokenizer.encode(), 16)
    content = f"{blake((folder / 'corpus.jsonl').read_bytes(), 16)} jsonl "
    corpus = {"content": blake(content.encode(), 16), "id_field": "id", "limit": None, "text_field": "text"}
    found = fields["made_with"]["corpora"][0]["digest"]
    assert found == blake(json.dumps(corpus, sort_keys=True).encode(), 16)
    manifest = load_manifest(folder / "index")
    assert manifest is not None
    assert manifest.whitening is not None
    assert fields["index"]["identity"] == manifest.identity_digest()
    assert fields["made_with"]["second_moment"]["digest"] == manifest.second_moment.digest
    assert fields["made_with"]["whitening"]["digest"] == manifest.whitening.digest
    assert fields["made_with"]["completion"] is None
    assert fields["digest"] == own_digest(fields)


def test_question_and_chosen_settings_are_recorded(made: World):
    audit = read_audit(made.audit)
    report = json.loads((made.folder / "results.report.json").read_text())
    assert (audit.question.top, audit.question.reranked, audit.question.exact) == (3, 5, False)
    assert (audit.question.mixing, audit.question.damping) == (None, None)
    assert (audit.answer.mixing, audit.answer.damping) == (report["mixing"]["value"], report["damping"])
    assert (audit.answer.codec, audit.answer.candidates, audit.answer.reranked) == ("1-bit", len(TEXTS), 5)
    assert audit.versions.torch == torch.__version__
    assert audit.to_json() == made.audit.read_text()


def test_the_format_is_frozen():
    """A change of a field needs a new AUDIT_VERSION and an entry in the changelog."""
    assert AUDIT_VERSION == 3
    found = {
        kind.__name__: [field.name for field in dataclasses.fields(kind)]
        for kind in (
            trackstar.Audit, *(trackstar.audit.record.__dict__[f"{name}Entry"] for name in (
                "Results", "Queries", "Generation", "Question", "Answer", "Index", "Stream", "Versions"
            ))
        )
    }  # fmt: skip
    assert {name: " ".join(fields) for name, fields in found.items()} == {
        "Audit": "audit_version results queries generation question answer made_with index stream versions device "
        "threads",
        "ResultsEntry": "file digest query_set",
        "QueriesEntry": "count digest",
        "GenerationEntry": "max_new_tokens temperature top_p sampling_seed stop chat prompts",
        "QuestionEntry": "top mixing damping reranked exact batch_tokens task prompt_field join",
        "AnswerEntry": "mixing damping candidates codec reranked",
        "IndexEntry": "path identity content manifest_file r_train",
        "StreamEntry": "second_moment second_moment_examples whitening_examples r_train_examples r_train",
        "VersionsEntry": "python trackstar torch transformers",
    }


def test_equal_runs_in_two_folders_differ_only_in_descriptive_fields(made: World, tmp_path: Path):
    other = make(tmp_path)
    # Not beside its model, so that the index records an absolute path.
    apart = tmp_path / "indexes" / "index"
    assert run("index", "--model", other.hand.model, "--data", other.hand.data[0], "--out", apart, *SETTINGS) == 0
    ask(other, "--index", apart, "--rerank", 5)
    one, two = (json.loads(world.audit.read_text()) for world in (made, other))
    assert one["digest"] == two["digest"]
    pairs = zip(leaves(one), leaves(two), strict=True)
    different = [name for (name, value), (_, other_value) in pairs if value != other_value]
    assert (
        {"index.path", "index.manifest_file", "made_with.model.source", "made_with.model.location"}
        <= set(different)
        <= set(one["descriptive"])
    )
    found = other.outcomes(dataclasses.replace(other.hand, index=made.folder / "index"), again=True)
    assert "differs" not in found.values()
    assert found["manifest.json"] == "note"


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{name}.{key}".removeprefix("."))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for inner in value:
            yield from leaves(inner, name)
    else:
        yield name, value


def test_another_configuration_of_the_same_weights_differs(world: World):
    file = world.folder / "model" / "config.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps(fields | {"rms_norm_eps": 1e-3}))
    report = check_audit(world.audit, world.hand, progress=False)
    found = {check.name: check for check in report.checks}
    assert (found["model"].outcome, found["configuration"].outcome) == ("same", "differs")
    assert "model.configuration.rms_norm_eps is 0.001, expected 1e-06" in found["configuration"].said
    assert not report.ok


def test_an_audit_of_the_version_before_is_read_and_repeated(
    made: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """As that version wrote it: of an index of format version 3, which does not record the configuration."""
    old = World(tmp_path / "old")
    shutil.copytree(made.folder, old.folder, ignore=shutil.ignore_patterns("index"))
    in_format_3(made.folder / "index", old.folder / "index")
    ask(old, "--index", old.folder / "index", "--model", old.folder / "model", "--rerank", 5)
    assert "format version 3 has no checksums of what is read" in capsys.readouterr().err
    fields = json.loads(old.audit.read_text())
    assert fields["made_with"]["format_version"] == 3
    assert "configuration" not in fields["made_with"]["model"]
    fields["audit_version"] = 1
    assert fields["question"].pop("join") == "auto"
    without_separators(old.folder / "results.jsonl", fields)
    added = {"made_with.model.location", "made_with.model.configuration", "made_with.model.libraries"}
    added |= {"made_with.corpora.location", "made_with.corpora.chat_template_text"}
    fields["descriptive"] = [name for name in fields["descriptive"] if name not in added]
    fields["digest"] = own_digest(fields)
    old.audit.write_text(json.dumps(fields))
    found = old.outcomes(again=True)
    assert "differs" not in found.values()
    assert found["configuration"] == "not checked"


def without_separators(results: Path, fields: dict[str, Any]) -> None:
    """Result lines as versions 1 and 2 of audits have them, and the audit's digest of them."""
    records = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    assert {record.pop("separator") for record in records} == {" "}
    results.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    fields["results"]["digest"] = blake(results.read_bytes())


# ---- Equal inputs ------------------------------------------------------------------------------------------------


def test_moved_inputs_are_the_same_and_give_the_same_answer(world: World):
    found = world.outcomes(again=True)
    assert set(found.values()) == {"same"}
    assert {"results", "queries", "task", "projection", "corpus", "index", "index's content", "index's bytes"} <= set(
        found
    )
    assert {
        "model",
        "configuration",
        "tokenizer",
        "versions",
        "λ",
        "damping",
        "candidates",
        "rankings",
        "scores",
    } <= set(found)


def test_inputs_that_are_not_given_are_not_checked(world: World):
    found = world.outcomes(AtHand())
    unchecked = {name for name, outcome in found.items() if outcome == "not checked"}
    assert unchecked == {"queries", "task", "corpus", "index", "model", "configuration", "tokenizer"}
    assert {found[name] for name in set(found) - unchecked} == {"same"}


def test_command_prints_one_line_per_check(world: World, capsys: pytest.CaptureFixture[str]):
    model = ("--model", world.folder / "model")
    capsys.readouterr()
    assert run("audit", world.audit, *model) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["same", "results"]
    assert [line for line in lines if line.startswith("not checked  corpus")]
    assert lines[-1].startswith(f"{world.audit}: all 7 checked items are the same; not checked: queries, task, cor")
    spoil_weight(world)
    assert run("audit", world.audit, *model) == 1
    shown = capsys.readouterr()
    assert [line for line in shown.out.splitlines() if line.startswith("differs      model ")]
    assert shown.err.splitlines()[-1].startswith(f"{world.audit}: 1 of 7 differ: model; not checked: ")


def test_corpora_are_matched_in_any_order(made: World, tmp_path: Path):
    more = write_lines(tmp_path / "more.jsonl", [{"id": "m0", "text": "Berlin is the capital of Germany."}])
    assert run("add", "--index", made.folder / "index", "--data", more, "--out", tmp_path / "grown") == 0
    (tmp_path / "task.jsonl").write_bytes((made.folder / "task.jsonl").read_bytes())
    (tmp_path / "queries.jsonl").write_bytes((made.folder / "queries.jsonl").read_bytes())
    world = World(tmp_path)
    ask(world, "--index", tmp_path / "grown")
    first = str(made.folder / "corpus.jsonl")
    for data, expected in (
        ((str(more), first), ("same", "same")),
        ((str(more),), ("not checked", "same")),
        ((str(more), str(more)), ("differs", "same")),
    ):
        found = world.outcomes(AtHand(data=data))
        assert (found["corpus 1"], found["corpus 2"]) == expected
    with pytest.raises(OptionError, match="`data`: expected at most 2 corpora, as many as the audit names, found 3"):
        world.outcomes(AtHand(data=(first, first, first)))


# ---- Changed inputs ----------------------------------------------------------------------------------------------


def spoil_weight(world: World) -> None:
    path = world.folder / "model" / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] += 1e-3
    save_file(weights, path, metadata={"format": "pt"})


def _replaced(name: str, old: str, new: str) -> Callable[[World], object]:
    def spoil(world: World) -> None:
        path = world.folder / name
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new, 1), encoding="utf-8")

    return spoil


def _manifest(**changes: Any) -> Callable[[World], object]:
    """Replace the manifest by another valid one."""

    def spoil(world: World) -> None:
        manifest = load_manifest(world.folder / "index")
        assert manifest is not None
        (world.folder / "index" / "manifest.json").write_text(dataclasses.replace(manifest, **changes).to_json())

    return spoil


def _other_completion(world: World) -> None:
    manifest = load_manifest(world.folder / "index")
    assert manifest is not None
    assert manifest.completion is not None
    _manifest(completion=dataclasses.replace(manifest.completion, skipped=1))(world)


def _one_query(world: World) -> None:
    path = world.folder / "queries.jsonl"
    path.write_text(path.read_text().splitlines()[0] + "\n")


def _flipped(name: str) -> Callable[[World], object]:
    def spoil(world: World) -> None:
        path = world.folder / name
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)

    return spoil


CHANGES: dict[str, tuple[Callable[[World], object], set[str]]] = {
    "weight": (spoil_weight, {"model"}),
    "tokenizer": (lambda w: tiny_tokenizer("bos_eos").save_pretrained(w.folder / "model"), {"tokenizer"}),
    "record": (_replaced("corpus.jsonl", "Paris", "Lyon"), {"corpus"}),
    "record's name": (_replaced("corpus.jsonl", '"t3"', '"t99"'), {"corpus"}),
    "query": (_replaced("queries.jsonl", "The capital", "the capital"), {"queries"}),
    "query's name": (_replaced("queries.jsonl", "France-1", "France-7"), {"queries"}),
    "task's query": (_replaced("task.jsonl", "The capital", "the capital"), {"task"}),
    "query left out": (_one_query, {"queries"}),
    "results' passage": (_replaced("results.jsonl", "Trains to", "Planes to"), {"results"}),
    "results' prompt": (_replaced("results.jsonl", "of France is", "of Spain is"), {"results", "queries in results"}),
    "results' line": (_replaced("results.jsonl", '{"example_id"', '{"example'), {"results", "queries in results"}),
    "results lost": (lambda w: (w.folder / "results.jsonl").unlink(), {"results"}),
    "manifest by hand": (_replaced("index/manifest.json", '"seed": 0', '"seed": 1'), {"index's manifest"}),
    "another manifest": (_manifest(trackstar_version="9.9"), {"index", "index's bytes"}),
    "another completion": (_other_completion, {"index's content"}),
    "unfinished": (_manifest(completion=None), {"index's content"}),
    "byte of a shard": (_flipped("index/shards/000000.safetensors"), {"index's bytes"}),
    "byte of V": (_flipped("index/second_moment.safetensors"), {"index's bytes"}),
    "byte of W_train": (_flipped("index/whitening.safetensors"), {"index's bytes"}),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_reported_by_name(change: str, world: World):
    spoil, expected = CHANGES[change]
    spoil(world)
    found = world.outcomes()
    differing = {name for name, outcome in found.items() if outcome == "differs"}
    assert expected <= differing
    assert differing <= expected | {"index's bytes", "index's content"}  # a shard names its manifest


def test_a_field_of_another_manifest_is_named(world: World):
    _manifest(trackstar_version="9.9")(world)
    report = check_audit(world.audit, world.hand)
    said = {check.name: check.said for check in report.checks}
    assert said["index"] == f"trackstar_version is '9.9', expected '{report.audit.versions.trackstar}'"


# ---- Recomputation -----------------------------------------------------------------------------------------------


def _swap(record: dict[str, Any]) -> None:
    for name in ("proponents", "proponent_ids"):
        record[name][:2] = reversed(record[name][:2])


FORGERIES: dict[str, tuple[Callable[[dict[str, Any]], object], set[str]]] = {
    "score": (lambda record: record["proponent_scores"].__setitem__(0, 0.99), {"scores"}),
    "scores that are no numbers": (lambda record: record.update(opponent_scores=[True, None, "x"]), {"scores"}),
    "scores left out": (lambda record: record.pop("opponent_scores"), {"scores"}),
    "passage": (lambda record: record["opponents"].__setitem__(1, "Rome burns."), {"rankings"}),
    "order": (_swap, {"rankings"}),
    "set of queries": (lambda record: record.update(query_set="others"), {"rankings"}),
    "label": (lambda record: record.update(groundtruth="Rome"), {"rankings"}),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_recomputation_finds_a_consistently_forged_answer(forgery: str, world: World):
    change, expected = FORGERIES[forgery]
    forge_results(world, change)
    assert "differs" not in world.outcomes().values()
    report = check_audit(world.audit, world.hand, again=True, progress=False)
    assert set(report.named("differs")) == expected
    assert [check.said for check in report.checks if check.outcome == "differs"] == [
        "1 of 4 queries, the first is France-1"
    ]


@pytest.mark.parametrize(
    ("path", "value", "name"),
    [
        ("answer.mixing", 0.5, "λ"), ("answer.damping", 0.01, "damping"), ("answer.candidates", 7, "candidates"),
        ("question.top", 2, "rankings"), ("question.mixing", 0.01, "λ"), ("answer.codec", "int8", "candidates"),
    ],
)  # fmt: skip
def test_recomputation_finds_a_forged_setting(path: str, value: object, name: str, world: World):
    part, field = path.split(".")
    forge(world.audit, lambda fields: fields[part].update({field: value}))
    assert "differs" not in world.outcomes().values()
    assert world.outcomes(again=True)[name] == "differs"


def test_recomputation_does_not_use_derived_files(made: World, world: World):
    derived = sorted((world.folder / "index" / "derived").glob("*.safetensors"))
    assert derived
    index = Index.open(world.folder / "index")
    for path in derived:
        saved = index.load_derived(path.stem)
        assert saved is not None
        forged = {name: tensor * 3 + 1 if tensor.is_floating_point() else tensor for name, tensor in saved.items()}
        assert index.save_derived(path.stem, forged)
    before = {path.name: path.read_bytes() for path in derived}
    assert set(world.outcomes(again=True).values()) == {"same"}  # verify accepts them: their digests are right
    assert {path.name: path.read_bytes() for path in derived} == before
    # An answer that used them differs from the recomputed one.
    ask(world, "--index", world.folder / "index", "--rerank", 5)
    assert "differs" in world.outcomes(again=True).values()
    assert set(made.outcomes(again=True).values()) == {"same"}


def test_a_different_input_prevents_recomputation(world: World):
    spoil_weight(world)
    found = world.outcomes(again=True)
    assert (found["model"], found["answer"]) == ("differs", "not checked")
    assert "rankings" not in found


def test_edited_results_are_compared_and_the_query_is_named(world: World):
    _replaced("results.jsonl", "Trains to", "Planes to")(world)
    found = world.outcomes(again=True)
    assert (found["results"], found["rankings"], found["scores"]) == ("differs", "differs", "same")


@pytest.mark.parametrize("lacking", ["index", "model", "task"])
def test_recomputation_needs_every_input(lacking: str, world: World):
    with pytest.raises(OptionError, match=f"`again=True`: needs `model`, `index`, `task`; pass `{lacking}`$"):
        world.outcomes(dataclasses.replace(world.hand, **{lacking: None}), again=True)


def test_recomputation_uses_the_same_settings(world: World):
    for options in (("--exact",), ("--rerank", 0, "--mixing", "0.25"), ("--mixing", 0), ("--batch-tokens", 64)):
        ask(world, "--index", world.folder / "index", *options)
        assert set(world.outcomes(again=True).values()) == {"same"}, options


# ---- A pass without an index, generated completions, Python -----------------------------------------------------


def test_a_pass_without_an_index_can_be_audited(world: World):
    queries = trackstar.read_queries(world.folder / "queries.jsonl")
    report = trackstar.stream_queries(
        world.folder / "model", str(world.folder / "corpus.jsonl"), queries, k=2, side=4, seed=3, progress=False
    )
    lines, _ = trackstar.write_results(report, world.folder / "results.jsonl")
    trackstar.write_audit(report, lines)
    fields = json.loads(world.audit.read_text())
    assert fields["index"] is None
    assert fields["stream"]["second_moment"] == "auto"
    assert fields["made_with"]["second_moment"]["digest"]
    hand = dataclasses.replace(world.hand, index=None, task=None)
    found = world.outcomes(hand, again=True)
    assert set(found.values()) == {"same"}
    assert {"V", "R_train", "corpus", "rankings", "scores"} <= set(found)
    with pytest.raises(
        OptionError, match="`index`: the audited answer was computed without an index; pass `data` instead"
    ):
        world.outcomes(dataclasses.replace(hand, index=world.folder / "index"))
    with pytest.raises(OptionError, match="`task`: the audit's R_eval comes from the queries themselves"):
        world.outcomes(dataclasses.replace(hand, task=world.folder / "task.jsonl"))
    with pytest.raises(OptionError, match="`again=True`: needs `model`, `data`; pass `model` and `data`"):
        world.outcomes(AtHand(), again=True)
    forge(world.audit, lambda fields: fields["stream"].update(whitening_examples=4))
    found = world.outcomes(hand, again=True)
    assert (found["R_train"], found["scores"]) == ("note", "differs")
    _replaced("corpus.jsonl", "Paris", "Lyon")(world)
    found = world.outcomes(hand, again=True)
    assert (found["corpus"], found["answer"]) == ("differs", "not checked")


def test_generated_completions_are_generated_again(world: World):
    prompts = [{"id": f"p{place}", "prompt": query.prompt} for place, query in enumerate(QUERIES[:3])]
    write_lines(world.folder / "queries.jsonl", prompts)
    asked = ("--queries", world.folder / "queries.jsonl", "--generate", "--max-new-tokens", 3, "--top", 2)
    assert run("query", "--index", world.folder / "index", *asked, "--out", world.folder / "results.jsonl") == 0
    hand = dataclasses.replace(world.hand, task=None)
    found = world.outcomes(hand, again=True)
    assert set(found.values()) == {"same"}
    assert {"prompts", "completions", "rankings"} <= set(found)
    forge(world.audit, lambda fields: fields["generation"].update(max_new_tokens=1))
    assert world.outcomes(hand, again=True)["completions"] == "differs"
    write_lines(world.folder / "queries.jsonl", prompts[:2])
    assert world.outcomes(hand)["prompts"] == "differs"


def test_python_and_the_command_write_and_check_the_same(world: World, tmp_path: Path):
    report = trackstar.answer_queries(world.folder / "index", QUERIES[:2], model=world.folder / "model", progress=False)
    lines, _ = trackstar.write_results(report, tmp_path / "r.jsonl")
    written = trackstar.write_audit(report, lines)
    assert written == tmp_path / "r.audit.json"
    found = trackstar.check_audit(written, trackstar.AtHand(results=lines))
    assert found.ok
    assert found.audit == trackstar.read_audit(written)
    with pytest.raises(AuditError, match="the report does not record how it was computed"):
        trackstar.write_audit(dataclasses.replace(report, provenance=None), lines)
    streamed = trackstar.stream_queries(
        world.folder / "model", TEXTS, QUERIES[:1], side=4, second_moment="estimate", progress=False
    )
    written = trackstar.write_audit(streamed, lines)
    found = trackstar.check_audit(written, trackstar.AtHand(data=(TEXTS,)))
    assert {check.name: check.outcome for check in found.checks}["corpus"] == "same"


def test_recomputation_needs_a_second_moment_that_was_passed(world: World, tmp_path: Path):
    moment = second_moment_of_index(Index.open(world.folder / "index"))
    asked: dict[str, Any] = {"k": 2, "side": 4, "progress": False}
    report = trackstar.stream_queries(world.folder / "model", TEXTS, QUERIES[:2], second_moment=moment, **asked)
    lines, _ = trackstar.write_results(report, tmp_path / "results.jsonl")
    written = trackstar.write_audit(report, lines)
    hand = AtHand(model=world.folder / "model", data=(TEXTS,))
    with pytest.raises(OptionError, match="`again=True`: needs `model`, `data`, `second_moment`; pass `second_moment`"):
        check_audit(written, hand, again=True, progress=False)
    hand = dataclasses.replace(hand, second_moment=moment)
    found = check_audit(written, hand, again=True, progress=False)
    assert found.ok
    assert {"V", "scores"} <= set(found.named("same"))
    with pytest.raises(OptionError, match="`second_moment`: V is stored in the index"):
        world.outcomes(dataclasses.replace(world.hand, second_moment="estimate"))


# ---- Bad files ---------------------------------------------------------------------------------------------------

HOSTILE: list[object] = [
    None, True, -1, 0, 10**30, 2**31, 1.5, -1.0, 1e300, "", "x", "../../results.jsonl", "\0", "\ud800", "\x1b[31mred",
    [], [None], {}, {"a": 1}, [[[[]]]],
]  # fmt: skip


def test_any_value_of_a_field_is_refused_or_compared(world: World):
    fields = json.loads(world.audit.read_text())
    forge(world.audit, lambda found: found)
    assert read_audit(world.audit).digest() == fields["digest"]
    compared = 0
    for number, place in enumerate(places(fields)):
        for value in HOSTILE[number % 2 :: 2]:
            changed = copy.deepcopy(fields)
            inside = changed
            for part in place[:-1]:
                inside = inside[part]
            inside[place[-1]] = value
            if isinstance(changed.get("descriptive"), list) and place[0] not in ("digest", "descriptive"):
                changed["digest"] = own_digest(changed)
            world.audit.write_text(json.dumps(changed))
            with contextlib.suppress(TrackstarError):
                compared += len(check_audit(world.audit, progress=False).checks)
    assert compared


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if place:
        yield place
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*place, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value[:1]):
            yield from places(inner, (*place, number))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the text is not JSON"), ("[1]", "the text is [1], expected a JSON object"), ("{", "not JSON"),
        ("[" * 100_000, "nested too deeply"), ('{"audit_version": 1, "audit_version": 1}', "repeated"),
        ('{"audit_version": 4}', "audit_version is 4, expected at most 3: a newer trackstar wrote the file"),
        ('{"audit_version": 0}', "audit_version is 0, expected 1 to 3"),
        ("{}", "audit_version is None, expected 1 to 3"),
        ('{"audit_version": 1e999}', "audit_version is inf"), ('{"audit_version": NaN}', "a number is NaN"),
        ('{"audit_version": ' + "9" * 5000 + "}", "not JSON"), ('{"audit_version": 1}', "descriptive is None"),
    ],
)  # fmt: skip
def test_other_content_is_refused_in_one_line(text: str, said: str, tmp_path: Path):
    path = tmp_path / "a.audit.json"
    path.write_text(text)
    with pytest.raises(AuditError) as error:
        read_audit(path)
    assert said in str(error.value)
    assert str(error.value).startswith(f"{path}: ")
    assert len(str(error.value).splitlines()) == 1


def test_an_edited_audit_is_refused(world: World):
    _replaced("results.audit.json", '"top": 3', '"top": 2')(world)
    with pytest.raises(AuditError, match="the file was changed after it was written"):
        read_audit(world.audit)
    fields = json.loads(world.audit.read_text())
    for name in ("digest", "descriptive", "versions"):
        world.audit.write_text(json.dumps({key: value for key, value in fields.items() if key != name}))
        with pytest.raises(AuditError, match=f"{name} is"):
            read_audit(world.audit)


def test_scores_that_are_not_finite_are_never_close():
    from trackstar.audit.recomputation import _distance

    assert _distance([0.5], [0.25]) == 0.25
    assert _distance([], []) == 0
    assert _distance([0.5], [math.nan]) == math.inf
    assert _distance([0.5], [1]) == math.inf


def test_an_index_on_another_file_system_is_compared(world: World) -> None:
    fsspec.filesystem("memory").put(str(world.folder / "index"), "/audited/index", recursive=True)
    found = world.outcomes(dataclasses.replace(world.hand, index="memory://audited/index"))
    assert (found["index"], found["index's content"], found["index's bytes"]) == ("same", "same", "same")
