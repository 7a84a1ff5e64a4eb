"""A manifest is read back as it was written, or refused with the name of the wrong field."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from small_index import small_manifest, write_small_index
from trackstar import store
from trackstar.errors import DamagedIndexError, IndexMismatchError, OptionError
from trackstar.store import manifest_entries

# Another valid choice for each field with a fixed list of choices.
_OTHER_CHOICE = {"whitened": "projected", "1-bit": "2-bit",
    "float32": "float16", "factored": "none", "attention": "mlp", "mlp": "attention", "two-sided": "one-sided",
    "loss": "margin", "absolute": "relative", "text": "messages", "all": "completion", "auto": "none",
    "merged": "adapter",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> store.Manifest:
    return write_small_index(tmp_path_factory.mktemp("manifest") / "index")


def test_json_round_trip_gives_the_same_manifest(finished: store.Manifest) -> None:
    for manifest in (small_manifest(), finished):
        text = manifest.to_json()
        assert store.Manifest.from_json(text) == manifest
        assert store.Manifest.from_json(text).to_json() == text


def test_strings_that_are_not_unicode_come_back_unchanged() -> None:
    corpus = dataclasses.replace(small_manifest().corpora[0], source="/data/\udcff\n\0.jsonl")
    manifest = dataclasses.replace(small_manifest(), corpora=(corpus,))
    assert store.Manifest.from_json(manifest.to_json()) == manifest


def _leaf_changes(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Name of each leaf of a manifest, with a copy of the manifest in which only that leaf differs."""
    for field in dataclasses.fields(value):
        old, name = getattr(value, field.name), f"{path}.{field.name}".lstrip(".")
        for where, new in _changed(old, name):
            yield where, dataclasses.replace(value, **{field.name: new})


def _changed(old: Any, name: str) -> Iterator[tuple[str, Any]]:
    if dataclasses.is_dataclass(old):
        yield from _leaf_changes(old, name)
    elif isinstance(old, tuple):
        for index, item in enumerate(old):
            for where, new in _changed(item, f"{name}[{index}]"):
                yield where, (*old[:index], new, *old[index + 1 :])
    elif isinstance(old, dict):
        for key in old:
            yield f"{name}.{key}", old | {key: "other"}
    elif isinstance(old, str):
        yield name, _OTHER_CHOICE.get(old, f"{old}x")
    elif isinstance(old, bool):
        yield name, not old
    elif isinstance(old, int | float):
        yield name, old + 1
    elif old is None and name != "completion":
        yield name, 3 if name.endswith((".limit", ".pack", ".rank")) else "x"


def manifest_with_all_fields() -> store.Manifest:
    manifest = small_manifest("1-bit")
    model = dataclasses.replace(manifest.model, parameters="merged", adapter={"r": "8"})
    return dataclasses.replace(manifest, model=model)


CHANGES = list(_leaf_changes(manifest_with_all_fields()))


@pytest.mark.parametrize(("field", "changed"), CHANGES, ids=[field for field, _ in CHANGES])
def test_every_field_but_the_descriptive_ones_is_part_of_the_identity(field: str, changed: store.Manifest) -> None:
    manifest = manifest_with_all_fields()
    different = store.differences(changed, manifest)
    if field.replace("[0]", "") in manifest_entries.DESCRIPTIVE_FIELDS:
        assert different == []
        assert changed.identity_digest() == manifest.identity_digest()
    else:
        assert [name for name, _, _ in different] == [field]
        assert changed.identity_digest() != manifest.identity_digest()


def test_the_fields_changed_above_are_complete() -> None:
    assert len(CHANGES) == 67
    assert {field.split(".")[0].split("[")[0] for field, _ in CHANGES} == {
        field.name for field in dataclasses.fields(store.Manifest)
    } - {"completion"}


def test_completion_is_not_part_of_the_identity(finished: store.Manifest) -> None:
    assert store.differences(finished, small_manifest()) == []
    assert finished.identity_digest() == small_manifest().identity_digest()


def test_differences_show_both_values_and_missing_items() -> None:
    manifest = small_manifest()
    fewer = dataclasses.replace(manifest, layer_blocks=manifest.layer_blocks[:1])
    assert store.differences(fewer, manifest)[:2] == [
        ("layer_blocks.length", 1, 2),
        ("layer_blocks[1].name", None, "mlp.0-1"),
    ]


# Each: a change of the parsed JSON of a finished manifest, and the expected error.
DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a field is missing": (lambda m: m.pop("codec"), "codec is missing, expected one of 'float32'"),
    "a nested field is missing": (lambda m: m["model"].pop("digest"), "model.digest is missing, expected a string"),
    "a field is unknown": (lambda m: m.update(colour="red"), "colour is unknown, expected no field of this name"),
    "a number is a string": (lambda m: m.update(shard_examples="3"), "shard_examples is '3', expected a whole number"),
    "a number is true": (lambda m: m.update(shard_examples=True), "shard_examples is True, expected a whole number"),
    "a string is a number": (lambda m: m["model"].update(source=5), "model.source is 5, expected a string"),
    "a string is null": (lambda m: m["tokenizer"].update(digest=None), "tokenizer.digest is None, expected a string"),
    "an object is a list": (lambda m: m.update(model=[]), r"model is \[\], expected a JSON object"),
    "a list is an object": (lambda m: m.update(layer_blocks={}), r"layer_blocks is \{\}, expected a list"),
    "a pair has three": (
        lambda m: m["layer_blocks"][1].update(layers=[0, 1, 2]),
        r"layer_blocks\[1\].layers is \[0, 1, 2\], expected a list of 2",
    ),
    "a codec is unknown": (lambda m: m.update(codec="int4"), "codec is 'int4', expected one of 'float32', 'bfloat16'"),
    "no version": (lambda m: m.update(format_version=0), "format_version is 0, expected 3"),
    "an older version": (
        lambda m: m.update(format_version=1),
        "format_version is 1, expected 3 to 6: an older trackstar built the index in another format; build it again",
    ),
    "a newer version": (
        lambda m: m.update(format_version=7, trackstar_version="9.1", magic=1),
        r"format_version is 7, expected at most 6: a newer trackstar \(9.1\) built the index",
    ),
    "no examples a shard": (lambda m: m.update(shard_examples=0), "shard_examples is 0, expected at least 1"),
    "a side of zero": (lambda m: m["projection"].update(side=0), "projection.side is 0, expected at least 1"),
    "a side that fills no words of codes": (
        lambda m: m.update(codec="1-bit", projection={**m["projection"], "side": 4}),
        "projection.side is 4, expected a multiple of 8 for 1-bit",
    ),
    "no layer block": (lambda m: m.update(layer_blocks=[]), r"layer_blocks is \(\), expected at least one layer block"),
    "a shard outside of the folder": (
        lambda m: m["completion"]["shards"][1].update(file="../../secrets.safetensors"),
        r"completion.shards\[1\].file is '../../secrets.safetensors', expected 000001.safetensors",
    ),
    "a shard at an absolute place": (
        lambda m: m["completion"]["shards"][0].update(file="/dev/zero"),
        r"completion.shards\[0\].file is '/dev/zero', expected 000000.safetensors",
    ),
    "a shard is left out": (
        lambda m: m["completion"]["shards"].pop(0),
        r"completion.shards\[0\].file is '000001.safetensors', expected 000000.safetensors",
    ),
    "a short shard in the middle": (
        lambda m: m["completion"]["shards"][1].update(rows=2),
        r"completion.shards\[1\].rows is 2, expected 3",
    ),
    "a negative shard": (
        lambda m: m["completion"]["shards"][2].update(rows=-2),
        r"completion.shards\[2\].rows is -2, expected 1 to 3",
    ),
    "rows do not add up": (
        lambda m: m["completion"].update(rows=9),
        "completion.rows is 9, expected 8, the sum over the shards",
    ),
    "whitened without a whitening": (
        lambda m: m.update(coordinates="whitened"),
        "whitening is None, expected the whit",
    ),
    "no corpus": (lambda m: m.update(corpora=[]), r"corpora is \(\), expected at least one corpus"),
    "a corpus that begins late": (
        lambda m: m["corpora"][0].update(first_record=3),
        r"corpora.first_record is \[3\], expected numbers that rise from 0",
    ),
    "no R_train": (
        lambda m: m["completion"].update(autocorrelation_digest=None),
        "completion.autocorrelation_digest is None, expected a digest",
    ),
    "an R_train of few examples": (
        lambda m: m["projection"].update(side=5),
        "completion.autocorrelation_digest is '.*', expected null",
    ),
    "a rank beyond the dimensions": (
        lambda m: m.update(coordinates="whitened", whitening={"source": "", "damping": 0.1, "digest": "", "rank": 17}),
        "whitening.rank is 17, expected null, or 0 to 16",
    ),
    "a negative count": (lambda m: m["completion"].update(skipped=-1), "completion.skipped is -1, expected at least 0"),
    "another digest": (lambda m: m.update(digest="0" * 64), "the text was changed after it was written"),
    "another value": (lambda m: m["projection"].update(seed=8), "the text was changed after it was written"),
    "a descriptive value": (lambda m: m["model"].update(source="x"), "the text was changed after it was written"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_field_is_named(finished: store.Manifest, name: str) -> None:
    damage, expected = DAMAGE[name]
    fields = json.loads(finished.to_json())
    damage(fields)
    with pytest.raises(DamagedIndexError, match=expected) as caught:
        store.Manifest.from_json(json.dumps(fields, indent=1) + "\n", file="IDX/manifest.json")
    assert str(caught.value).startswith("IDX/manifest.json: ")
    assert "\n" not in str(caught.value)


BAD_TEXTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the text is not JSON"),
    "blank": (b" \n", "the text is not JSON"),
    "binary": (b"\x00\x01\x02\xff", "byte 3 is not UTF-8"),
    "zeros": (b"\0" * 5000, "the text is not JSON"),
    "not an object": (b"[1, 2]", r"the text is \[1, 2\], expected a JSON object"),
    "no fields": (b"{}", "format_version is missing, expected a whole number"),
    "deep": (b"[" * 200_000, "the text is nested too deeply, expected a JSON object"),
    "a huge number": (b'{"format_version": ' + b"9" * 10_000 + b"}", "the text is not JSON"),
    "NaN": (b'{"format_version": NaN}', "a number is NaN, expected a finite number"),
    "a key twice": (
        b'{"format_version": 1, "format_version": 1}',
        "'format_version' is repeated, expected one value",
    ),
}


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_a_file_that_is_not_a_manifest_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    content, expected = BAD_TEXTS[name]
    (tmp_path / "manifest.json").write_bytes(content)
    for opening in (store.load_manifest, store.Index.open, lambda path: store.IndexWriter.open(path, small_manifest())):
        with pytest.raises(DamagedIndexError, match=expected) as caught:
            opening(tmp_path)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400


def test_a_manifest_cut_anywhere_or_changed_in_any_byte_is_refused(finished: store.Manifest) -> None:
    text = finished.to_json()
    for length in [*range(0, len(text), 17), len(text) - 1]:
        with pytest.raises(DamagedIndexError):
            store.Manifest.from_json(text[:length])
    for place in range(0, len(text), 11):
        changed = chr(ord(text[place]) ^ 1)
        with pytest.raises(DamagedIndexError):
            store.Manifest.from_json(text[:place] + changed + text[place + 1 :])


def test_an_oversized_manifest_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "manifest.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(DamagedIndexError, match="1099511627776 bytes, expected a manifest of at most 268435456"):
        store.load_manifest(tmp_path)


def test_a_missing_manifest_is_none(tmp_path: Path) -> None:
    assert store.load_manifest(tmp_path) is None
    assert store.load_manifest(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"shard_examples": 0}, "shard_examples is 0, expected at least 1"),
        ({"codec": "int4"}, "codec is 'int4', expected one of float32, bfloat16, float16"),
        ({"layer_blocks": ()}, "expected at least one layer block"),
    ],
)
def test_an_impossible_manifest_is_refused_before_anything_is_written(
    tmp_path: Path, change: dict[str, Any], expected: str
) -> None:
    manifest = object.__new__(store.Manifest)  # past the type checks of the tests, as a caller without them
    for field in dataclasses.fields(store.Manifest):
        object.__setattr__(manifest, field.name, change.get(field.name, getattr(small_manifest(), field.name)))
    with pytest.raises(OptionError, match=expected):
        store.IndexWriter.open(tmp_path / "index", manifest)
    assert list(tmp_path.iterdir()) == []


def test_resuming_with_another_manifest_names_the_first_field_that_differs(tmp_path: Path) -> None:
    write_small_index(tmp_path)
    with pytest.raises(
        IndexMismatchError,
        match=r"the existing index has `seed` 7, but 8 was requested; use the same settings",
    ):
        store.IndexWriter.open(tmp_path, small_manifest(seed=8))
    with pytest.raises(IndexMismatchError, match=r"`seed` 7, but 8 was requested \(and 1 more differ\)"):
        store.IndexWriter.open(tmp_path, small_manifest("float16", seed=8))
    assert store.verify(tmp_path).ok


def test_a_model_and_corpus_that_moved_are_still_the_same(tmp_path: Path) -> None:
    manifest = small_manifest()
    write_small_index(tmp_path)
    moved = dataclasses.replace(
        manifest,
        model=dataclasses.replace(manifest.model, source="elsewhere/tiny"),
        corpora=(dataclasses.replace(manifest.corpora[0], source="elsewhere/corpus.jsonl"),),
    )
    with store.IndexWriter.open(tmp_path, moved) as writer:
        assert writer.completed
        assert writer.manifest.model.source == "/models/tiny"
