"""An index is used with the network, the tokens and the numbers that it was made with, or refused in one line."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from capitals import QUERIES, TEXTS
from shard_bytes import DIGEST, in_format_3, sealed, sealed_manifest
from tiny_models import save_tiny_model
from trackstar import store
from trackstar.attribution.answering import answer_queries, checked_queries
from trackstar.attribution.attributor import Attributor
from trackstar.attribution.results import QueryReport
from trackstar.editing.adding import add_examples
from trackstar.editing.converting import convert_index
from trackstar.editing.merging import merge_indexes
from trackstar.editing.removing import remove_examples
from trackstar.errors import DamagedIndexError, IndexMismatchError, ModelError, OptionError, StoreError
from trackstar.indexing.build import build_index
from trackstar.model.language_model import load_model
from trackstar.retrieval.plausibility import check_rows, check_scores
from trackstar.store import Index
from trackstar.workers.index_model import model_of_index

SETTINGS: dict[str, Any] = {
    "side": 8, "layer_blocks": 2, "codec": "1-bit", "shard_examples": 5, "progress": False,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class World:
    """A folder with a model, a corpus, and an index in a codec that is re-ranked."""

    folder: Path

    @property
    def index(self) -> Path:
        return self.folder / "index"

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def ask(self, **options: Any) -> QueryReport:
        options = {"reranked": 5, "k": 3, "progress": False} | options
        return answer_queries(self.index, QUERIES[:3], **options)


def make(folder: Path) -> World:
    save_tiny_model(folder / "model", "llama")
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    build_index(folder / "model", folder / "corpus.jsonl", folder / "index", **SETTINGS)
    return World(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make(tmp_path_factory.mktemp("network"))


@pytest.fixture
def world(made: World, tmp_path: Path) -> World:
    """A copy that a test may change."""
    shutil.copytree(made.folder, tmp_path / "copy")
    return World(tmp_path / "copy")


def answers(report: QueryReport) -> list[Any]:
    return [[(one.row, round(one.influence, 5)) for one in (*r.proponents, *r.opponents)] for r in report.results]


def change_configuration(world: World, **fields: Any) -> None:
    file = world.model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


# ---- The network -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"), [("rms_norm_eps", 1e-4), ("hidden_act", "gelu"), ("max_position_embeddings", 65)]
)
def test_equal_weights_with_another_configuration_are_another_model(world: World, name: str, value: Any) -> None:
    change_configuration(world, **{name: value})
    uses: dict[str, Callable[[], object]] = {
        "query": world.ask,
        "add": lambda: add_examples(world.index, ["Rome is old."], world.folder / "more", progress=False),
        "Attributor": lambda: Attributor(Index.open(world.index), load_model(world.model, layer_blocks=2)),
    }
    for use in uses.values():
        with pytest.raises(
            IndexMismatchError, match=rf"made with model\.configuration\.{name} .*, but .* has {value}|gelu"
        ):
            use()
    with pytest.raises(IndexMismatchError, match=rf"the existing index has model\.configuration\.{name} "):
        build_index(world.model, world.folder / "corpus.jsonl", world.index, **SETTINGS)


def test_the_rotation_of_positions_is_part_of_the_configuration(world: World) -> None:
    change_configuration(world, rope_parameters={"rope_theta": 500.0, "rope_type": "default"})
    with pytest.raises(IndexMismatchError, match=r"made with model\.configuration\.rope_parameters"):
        world.ask()


def test_fields_that_change_nothing_of_the_function_may_change(world: World) -> None:
    expected = answers(world.ask())
    change_configuration(
        world, use_cache=False, eos_token_id=5, attention_dropout=0.5, initializer_range=0.5, transformers_version="4.0"
    )
    assert answers(world.ask()) == expected


def test_a_field_that_only_one_library_version_knows_is_no_difference(world: World) -> None:
    change_configuration(world, a_new_field=3)
    assert len(world.ask().results) == 3


def test_an_unfinished_index_is_not_resumed_with_another_configuration(world: World) -> None:
    unfinished = unfinished_copy(world)
    change_configuration(world, rms_norm_eps=1e-4)
    before = {path.name: path.read_bytes() for path in (unfinished / "shards").iterdir()}
    with pytest.raises(IndexMismatchError, match=r"the existing index has model\.configuration\.rms_norm_eps"):
        build_index(world.model, world.folder / "corpus.jsonl", unfinished, **SETTINGS)
    assert {path.name: path.read_bytes() for path in (unfinished / "shards").iterdir()} == before


def unfinished_copy(world: World) -> Path:
    """The index as a run leaves it that is killed before its last shards."""
    out = world.folder / "unfinished"
    shutil.copytree(world.index, out)
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(sealed_manifest(manifest | {"completion": None}))
    for path in sorted((out / "shards").iterdir())[2:]:
        path.unlink()
    return out


def other_attention(patch: pytest.MonkeyPatch) -> None:
    """Attention as a faulty version of a library might compute it."""
    attention = torch.nn.functional.scaled_dot_product_attention

    def changed(query: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        return attention(query * 1.05, *arguments, **options)

    patch.setattr(torch.nn.functional, "scaled_dot_product_attention", changed)


@pytest.mark.parametrize("reranked", [0, 5])
def test_another_computation_of_the_same_model_is_found_by_the_losses(
    world: World, reranked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No field names it: the losses of stored examples are computed again, even if nothing is re-ranked."""
    unfinished = unfinished_copy(world)
    other_attention(monkeypatch)
    said = r"example corpus:\d+ \(row \d+\) has loss \d+\.\d+ with .*, expected the stored \d+\.\d+; the model, its"
    with pytest.raises(IndexMismatchError, match=said):
        world.ask(reranked=reranked)
    with pytest.raises(IndexMismatchError, match=said):
        add_examples(world.index, ["Rome is old."], world.folder / "more", progress=False)
    with pytest.raises(IndexMismatchError, match=said):
        build_index(world.model, world.folder / "corpus.jsonl", unfinished, **SETTINGS)
    with pytest.raises(IndexMismatchError, match=said):
        build_index(world.model, world.folder / "corpus.jsonl", unfinished, share="1/2", **SETTINGS)


def test_an_attributor_compares_the_losses_of_what_it_computes_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = Index.open(world.index)
    attributor = Attributor(index, model_of_index(index), reranked=0)
    attribution = attributor.attribute(QUERIES[0])
    other_attention(monkeypatch)
    for use in (attributor.over_candidate, attributor.over_query, attributor.measure):
        with pytest.raises(IndexMismatchError, match=r"\(row 4\) has loss"):
            use(attribution, 4)


# ---- Damage that agrees with its checksums -----------------------------------------------------------------------


def rewrite(index: Path, row: int, tensor: str, change: Callable[[bytearray], None]) -> None:
    """Change a row's bytes of a tensor, and give the index the checksums and digests that it then has."""
    opened = Index.open(index)
    shard = next(shard for shard in opened.shards if 0 <= row - shard.first_row < shard.rows)
    info, place = shard.file.tensors[tensor], row - shard.first_row
    if tensor == "tokens":
        offsets = shard.read("token_offsets")
        start, stop = (info.start + 4 * int(offsets[place + one]) for one in (0, 1))
    else:
        start, stop = (info.start + (place + one) * info.size // shard.rows for one in (0, 1))
    file = Path(str(shard.path))
    content = bytearray(file.read_bytes())
    part = content[start:stop]
    change(part)
    content[start:stop] = part
    file.write_bytes(sealed(bytes(content)))
    manifest = json.loads((index / "manifest.json").read_text())
    for entry in manifest["completion"]["shards"]:
        if entry["file"] == file.name:
            entry["digest"] = file.read_bytes()[DIGEST].decode("ascii")
    (index / "manifest.json").write_text(sealed_manifest(manifest))


@pytest.mark.parametrize("token", [7, 10**6], ids=["another token", "a token beyond the vocabulary"])
def test_a_changed_token_of_the_first_candidate_is_named(world: World, token: int) -> None:
    top = world.ask().results[0].proponents[0]

    def change(tokens: bytearray) -> None:
        tokens[4:8] = token.to_bytes(4, "little")

    rewrite(world.index, top.row, "tokens", change)
    said = rf"example {top.example_id} \(row {top.row}\) has " + (
        "loss" if token == 7 else f"token {token}, expected 0 to 299, the model's vocabulary"
    )
    with pytest.raises((IndexMismatchError, DamagedIndexError), match=said):
        world.ask()
    with pytest.raises((IndexMismatchError, DamagedIndexError), match=said):
        world.ask(reranked=None, exact=True)


@pytest.mark.parametrize("codec", ["float32", "float16"])
def test_a_number_that_makes_a_score_or_a_norm_impossible_is_not_shown(made: World, tmp_path: Path, codec: Any) -> None:
    out = tmp_path / "index"
    build_index(made.model, made.folder / "corpus.jsonl", out, **{**SETTINGS, "codec": codec})
    top = answer_queries(out, QUERIES[:1], k=3, progress=False).results[0].proponents[0]

    def change(codes: bytearray) -> None:
        codes[-1] ^= 0x40  # the highest bit of the last number's exponent

    rewrite(out, top.row, "codes", change)
    said = rf"row {top.row} has (influence|norm) |found NaN or infinity for row {top.row}"
    with pytest.raises(DamagedIndexError, match=said):
        check_rows(Index.open(out), torch.tensor([top.row]))
    assert check_rows(Index.open(out), torch.tensor([top.row + 1])) is None
    with pytest.raises(DamagedIndexError, match=r"row 2 has influence 1\.5, expected -1 to 1"):
        check_scores(Index.open(out), torch.tensor([[1, 2]]), torch.tensor([[1.0, 1.5]]), exact=False)


# ---- Where the model is ------------------------------------------------------------------------------------------


def test_a_folder_with_model_and_index_can_be_moved_and_asked_from_anywhere(
    made: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = Index.open(made.index).manifest
    assert (manifest.model.source, manifest.model.location) == ("../model", "relative")
    assert (manifest.corpora[0].source, manifest.corpora[0].location) == ("../corpus.jsonl", "relative")
    expected = answers(made.ask())
    shutil.copytree(made.folder, tmp_path / "a" / "moved")
    monkeypatch.chdir(tmp_path)
    assert answers(World(Path("a/moved")).ask()) == expected


def test_a_model_elsewhere_is_recorded_with_its_absolute_path(
    made: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made.folder)
    build_index("model", "corpus.jsonl", tmp_path / "indexes" / "index", **SETTINGS)
    monkeypatch.chdir(tmp_path)
    manifest = Index.open(tmp_path / "indexes" / "index").manifest
    assert (manifest.model.source, manifest.model.location) == (str(made.model), "absolute")
    assert (manifest.corpora[0].source, manifest.corpora[0].location) == (str(made.folder / "corpus.jsonl"), "absolute")
    assert answer_queries("indexes/index", QUERIES[:1], progress=False).model == str(made.model)


def test_a_missing_folder_never_becomes_a_name_on_the_hub(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("a hub was asked")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refused)
    shutil.rmtree(world.model)
    with pytest.raises(ModelError, match=r"no such model; this is where .*index says that its model is; pass"):
        world.ask()
    monkeypatch.chdir(world.folder.parent)
    for source in ("copy/model", "./other", "a/b/c", "other/", "~/other", str(world.model)):
        with pytest.raises(ModelError, match="no such folder"):
            load_model(source)


def test_editing_an_index_keeps_the_way_to_its_model(world: World, tmp_path: Path) -> None:
    out = tmp_path / "elsewhere" / "deep" / "converted"
    convert_index(world.index, out, codec="1-bit", progress=False)
    entry = Index.open(out).manifest.model
    assert (entry.source, entry.location) == (str(world.model), "absolute")
    convert_index(out, world.folder / "back", codec="1-bit", progress=False)
    entry = Index.open(world.folder / "back").manifest.model
    assert (entry.source, entry.location) == ("../model", "relative")


# ---- Indexes of the version before -------------------------------------------------------------------------------


def test_an_old_index_is_asked_with_a_word_and_copied_into_the_current_format(world: World) -> None:
    expected = answers(world.ask())
    old = World(world.folder / "old")
    in_format_3(world.index, old.index)
    report = old.ask(model=world.model)
    assert answers(report) == expected
    assert "format version 3 has no checksums of what is read" in report.summary()[-1]
    codec = store.Index.open(old.index).manifest.codec
    copied = convert_index(old.index, world.folder / "copied", codec=codec, progress=False)
    assert "does not record the model's configuration" in copied.notes[0]
    assert copied.manifest.model.configuration == {}
    for one, two in zip(copied.shards, Index.open(world.index).shards, strict=True):
        assert torch.equal(one.stored.codes, two.stored.codes)
    assert answers(answer_queries(copied, QUERIES[:3], model=world.model, reranked=5, k=3, progress=False)) == expected


def test_examples_are_added_to_an_old_index(world: World) -> None:
    old = in_format_3(world.index, world.folder / "old")
    more = add_examples(old, ["Rome is a city in Italy."], world.folder / "more", model=world.model, progress=False)
    assert more.manifest.format_version == store.FORMAT_VERSION
    assert more.rows == Index.open(old).rows + 1


# ---- What was found in review ------------------------------------------------------------------------------------


def test_low_bit_scores_near_the_task_are_no_false_alarm(made: World) -> None:
    """Norms in a task's coordinates are estimated from codes, so that coarse scores are not cosines."""
    index = Index.open(made.index)
    attributor = Attributor(index, model_of_index(index), task=QUERIES, mixing=0.999, reranked=0)
    for query in QUERIES:
        assert attributor.attribute(query).influences.isfinite().all()
    with pytest.raises(DamagedIndexError, match="row 1 has influence nan"):
        check_scores(index, torch.tensor([0, 1]), torch.tensor([5.0, float("nan")]), exact=False)
    with pytest.raises(DamagedIndexError, match=r"row 0 has influence 1\.01, expected -1 to 1"):
        check_scores(index, torch.tensor([0, 1]), torch.tensor([1.01, 0.0]), exact=True)


def test_an_index_that_is_opened_through_a_link_finds_its_model(made: World, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(made.index)
    assert answers(answer_queries(tmp_path / "link", QUERIES[:3], reranked=5, k=3, progress=False)) == answers(
        made.ask()
    )


def test_a_damaged_shard_does_not_stop_the_task_that_writes_it_again(world: World) -> None:
    unfinished = unfinished_copy(world)
    shard = Index.open(unfinished, allow_incomplete=True).shards[0]
    content = bytearray((unfinished / "shards" / "000000.safetensors").read_bytes())
    content[shard.file.tensors["token_offsets"].start] ^= 1
    (unfinished / "shards" / "000000.safetensors").write_bytes(content)
    for share in ("1/2", "2/2"):
        build_index(world.model, world.folder / "corpus.jsonl", unfinished, share=share, **SETTINGS)
    assert Index.open(unfinished, allow_incomplete=True).rows == Index.open(world.index).rows


def test_paths_that_lead_nowhere_stay_as_they_are(made: World) -> None:
    from trackstar.store.locations import relocated

    manifest = Index.open(made.index).manifest
    uploaded = store.as_folder("memory://somewhere/index")
    moved = relocated(manifest, uploaded, made.folder / "copy").model
    assert (moved.source, moved.location) == ("../model", "memory")
    old = dataclasses.replace(
        manifest,
        format_version=3,
        model=dataclasses.replace(manifest.model, source="models/a", location=None, configuration=None, libraries=None),
        corpora=tuple(dataclasses.replace(corpus, source="c.jsonl", location=None) for corpus in manifest.corpora),
    )
    typed = relocated(old, made.index, made.folder / "copy")
    assert (typed.model.source, typed.model.location) == ("models/a", "typed")
    assert (typed.corpora[0].source, typed.corpora[0].location) == ("c.jsonl", "typed")


def test_an_unfinished_old_index_says_who_can_finish_it(world: World) -> None:
    old = in_format_3(world.index, world.folder / "old")
    manifest = json.loads((old / "manifest.json").read_text())
    (old / "manifest.json").write_text(sealed_manifest(manifest | {"completion": None}))
    for use in (
        lambda: Index.open(old),
        lambda: build_index(world.model, world.folder / "corpus.jsonl", old, **SETTINGS),
    ):
        with pytest.raises(StoreError, match=r"finish it with trackstar 0\.1\.0"):
            use()


def test_models_in_memory_of_every_dtype_are_compared(tmp_path: Path) -> None:
    from tiny_models import tiny_model, tiny_tokenizer
    from trackstar.model.language_model import wrap_model

    for dtype in (torch.float64, torch.bfloat16):
        network = tiny_model("llama")
        torch.nn.Module.to(network, dtype=dtype)
        model = wrap_model(network, tiny_tokenizer(), layer_blocks=2)
        out = tmp_path / str(dtype)
        build_index(model, TEXTS, out, second_moment="none", **SETTINGS)
        assert model_of_index(Index.open(out), model) is model


def test_arguments_of_another_kind_are_one_line(made: World) -> None:
    """In Python: generators are taken, and what is no list of queries or ids is named."""
    query = QUERIES[0]
    assert checked_queries(one for one in [query]) == [query]
    for queries in ("text", query, [{"prompt": "a"}], 5):
        with pytest.raises(OptionError, match="`queries`: expected"):
            checked_queries(queries)
    with pytest.raises(OptionError, match="`indexes`: expected a list"):
        merge_indexes("f16", made.folder / "out")
    with pytest.raises(OptionError, match="`names`: expected a list of ids"):
        remove_examples(made.index, "name", made.folder / "out")
