"""Every reader of files, as a function of a file's bytes: what a user does with such a file, all of it.

`accepts` says whether a reader takes the bytes or refuses them as it must: with a `TrackstarError` of one printable
line. Anything else that comes out of it is a defect of trackstar.
"""

import dataclasses
import functools
import gc
import gzip
import io
import json
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

import small_index
from fuzz import mutations
from fuzz.mutations import Mutation
from tiny_models import save_tiny_model, tiny_model, tiny_tokenizer
from trackstar import store
from trackstar.attribution.question import IndexEntry, QueriesEntry, QuestionEntry, StreamEntry, content_digest
from trackstar.audit.checks import AtHand
from trackstar.audit.recomputation import check_audit
from trackstar.audit.record import AUDIT_VERSION, AnswerEntry, Audit, GenerationEntry, ResultsEntry, VersionsEntry
from trackstar.choices import CodecName, Coordinates
from trackstar.corpus import Corpus, open_corpus, query_text, read_names, read_queries, tokenize_examples
from trackstar.curvature.task import task_correction, train_spectrum
from trackstar.errors import LONGEST_MESSAGE, TrackstarError
from trackstar.evaluation.config import read_config
from trackstar.evaluation.fact_files import read_facts, read_sentences
from trackstar.evaluation.facts import evidence, fact_digest, to_queries
from trackstar.explorer.browsing import QueryFilter, query_page
from trackstar.explorer.candidates import candidate_text, query_record
from trackstar.explorer.exports import ExportedQuery, to_csv, to_html, to_jsonl
from trackstar.explorer.result_files import read_result_file
from trackstar.gradients.optimizer_state import second_moment_from_state
from trackstar.gradients.second_moment import SecondMoment
from trackstar.indexing.train_whitening import TrainWhitening
from trackstar.model.language_model import LanguageModel, load_model, wrap_model
from trackstar.store.files.places import Place
from trackstar.store.manifest import differences
from trackstar.store.shards import Shard
from trackstar.text import printable
from trackstar.workers.index_model import second_moment_of_index


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reader:
    """One kind of file.

    Attributes:
        name: What it is called.
        use: Reads a file of these bytes, in a folder that it may fill, and does with it what users do.
        seeds: Good files, and some that are nearly so.
        mutate: Changes a file's bytes to others that get past the first checks, too.
        longest: Most bytes of a file.
    """

    name: str
    use: Callable[[Path, bytes], None]
    seeds: Callable[[], list[bytes]]
    mutate: Mutation = mutations.havoc
    longest: int = 4096


class WrongRefusalError(AssertionError):
    """A reader refused a file with a message that is none."""


def accepts(reader: Reader, content: bytes, folder: Path) -> bool:
    """Whether the reader takes the bytes; false where it refuses them as it must.

    Raises:
        WrongRefusalError: The message is not one printable line of a sane length.
        Exception: Whatever else comes out of the reader.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return not _refusals([lambda: reader.use(folder, content)])


def _refusals(uses: Iterable[Callable[[], object]]) -> list[TrackstarError]:
    """Call all of them; how some refused, each in a message that is one."""
    errors = []
    for use in uses:
        try:
            use()
        except TrackstarError as error:
            message = str(error)
            if not message.strip() or not message.isprintable() or len(message) > LONGEST_MESSAGE:
                raise WrongRefusalError(f"{type(error).__name__}: {message[:1000]!r}") from error
            errors.append(error)
    return errors


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder in memory where there is such a place."""
    return tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)


def _drain(items: Iterable[object]) -> int:
    return sum(1 for _ in items)


def _each(*uses: Callable[[], object]) -> None:
    """All of them; the first refusal is told once all have had their turn."""
    for error in _refusals(uses)[:1]:
        raise error


def _any(*uses: Callable[[], object]) -> None:
    """All of them; the first refusal is told where there is nothing but refusals."""
    errors = _refusals(uses)
    if len(errors) == len(uses):
        raise errors[0]


# ---- Indexes --------------------------------------------------------------------------------------------------

# Codec to coordinates, layer blocks of a kind, and side.
SHAPES: Mapping[CodecName, tuple[Coordinates, int, int]] = {
    "float32": ("projected", 1, 2),
    "float16": ("whitened", 1, 2),
    "int8": ("whitened", 1, 8),
    "1-bit": ("whitened", 5, 8),
}
CODECS = tuple(SHAPES)


def manifest_of(codec: CodecName) -> store.Manifest:
    """The manifest, unfinished, of a small index whose tensors are what users' have."""
    coordinates, blocks, side = SHAPES[codec]
    small = small_index.small_manifest(codec)
    named = tuple(
        dataclasses.replace(block, name=f"{block.kind}.{number}")
        for block in small.layer_blocks
        for number in range(blocks)
    )
    whitening = store.WhiteningEntry(source="all", damping=0.5, digest=store.tensors_digest(_whitening(codec)))
    return dataclasses.replace(
        small,
        layer_blocks=named,
        projection=dataclasses.replace(small.projection, side=side),
        second_moment=dataclasses.replace(small.second_moment, digest=store.tensors_digest(SECOND_MOMENT)),
        coordinates=coordinates,
        whitening=whitening if coordinates == "whitened" else None,
    )


SECOND_MOMENT = {
    f"{part}/model.layers.0.{kind}.a": torch.arange(length) + 1.0
    for kind in ("attention", "mlp")
    for part, length in (("row", 5), ("column", 3))
}


def _squares(codec: CodecName) -> Tensor:
    """A positive definite matrix a block."""
    _, blocks, side = SHAPES[codec]
    return torch.eye(side**2).repeat(2 * blocks, 1, 1) + torch.full((2 * blocks, side**2, side**2), 0.25)


def _whitening(codec: CodecName) -> dict[str, Tensor]:
    return {"whitening": _squares(codec)}


def _content(codec: CodecName, first: int, stop: int) -> store.ShardContent:
    _, blocks, side = SHAPES[codec]
    columns = torch.arange(2 * blocks * side**2)
    rows = torch.stack([((7 * columns + 13 * row) % 31 - 15) * 2.0 ** (row % 8 - 5) for row in range(first, stop)])
    small = small_index.small_content(first, stop)
    return dataclasses.replace(small, stored=store.encode(rows, codec, 2 * blocks))


@functools.cache
def index_files(codec: CodecName) -> Mapping[str, bytes]:
    """A finished index of eight examples, with something derived from it and the progress of its making."""
    with scratch() as folder:
        path = Path(folder) / "index"
        with store.IndexWriter.open(path, manifest_of(codec)) as writer:
            for first in (0, 3, 6):
                writer.write_shard(_content(codec, first, min(first + 3, 8)))
            writer.write_tensors("second_moment", SECOND_MOMENT)
            if SHAPES[codec][0] == "whitened":
                writer.write_tensors("whitening", _whitening(codec))
            else:
                writer.write_tensors("autocorrelation", {"autocorrelation": _squares(codec)})
            writer.save_progress({"sum": torch.full((3,), 8.0)})
            progress = (path / "progress.safetensors").read_bytes()
            writer.finish(records=10, skipped=5)
        # More rows than dimensions a block are needed for R_train itself to be asked for.
        index = store.Index.open(path)
        train_spectrum(index)
        return small_index.index_files(path) | {"progress.safetensors": progress}


@functools.cache
def finished_manifest(codec: CodecName) -> store.Manifest:
    """The manifest of `index_files`."""
    return store.Manifest.from_json(index_files(codec)["manifest.json"].decode("ascii"))


def write_index(folder: Path, files: Mapping[str, bytes]) -> Place:
    """The files in a folder `index`; those of an earlier call that are not among them are taken away."""
    path = folder / "index"
    for each in list(path.rglob("*")):
        if each.is_file() and each.relative_to(path).as_posix() not in files:
            each.unlink()
    for name, content in files.items():
        place = path / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists() or place.read_bytes() != content:
            place.write_bytes(content)
    return path


def _use_index(path: Place) -> None:
    """What queries, the explorer and `verify` do with an index."""
    _each(
        lambda: store.verify(path),
        lambda: _read_rows(path, direct=False),
        lambda: _read_rows(path, direct=True),
        lambda: _read_tensors(path),
    )


def _read_rows(path: Place, *, direct: bool) -> None:
    index = store.Index.open(path, allow_incomplete=True, direct_reads=direct)
    if not index.rows:
        return
    rows = 0
    for chunk in index.iterate(2):
        decoded = chunk.stored.decode()
        assert decoded.shape == (len(chunk.stored), index.dimensions)
        rows += len(decoded)
    assert rows == index.rows
    assert len(index.norms()) == rows
    some = sorted({0, rows // 2, rows - 1})
    assert len(index.some_rows(some).decode()) == len(index.some_losses(some)) == len(some)
    examples = list(index.examples())
    assert [stored.row for stored in examples] == list(range(rows))
    assert index.example(rows - 1).example.text == examples[-1].example.text
    for stored in examples:
        example = stored.example
        assert len(example.token_ids) == len(example.target_mask)
        # Shown and written as text by the explorer.
        json.dumps([example.example_id, example.parent_id, example.text, example.record, example.window])
    for shard in index.shards:
        _use_shard(shard)


def _use_shard(shard: Shard) -> None:
    shard.check()
    assert shard.records.shape == shard.windows.shape == shard.target_counts.shape == (shard.rows,)


def _read_tensors(path: Place) -> None:
    index = store.Index.open(path)
    second_moment_of_index(index)
    # What a run that goes on takes up again.
    if index.manifest.second_moment.digest is not None:
        SecondMoment.from_tensors(index.tensors("second_moment"), source="estimated", floor=0.0)
    TrainWhitening.written_in(path, damping=None, source="all")
    task_correction(index, torch.zeros(0, index.dimensions), mixing=0.0)
    train_spectrum(index)


def _renamed_shards(files: Mapping[str, bytes], manifest: store.Manifest) -> dict[str, bytes]:
    """The files, with shards that say that they are of this manifest's index, and a manifest that says so of them."""
    digest = manifest.identity_digest().encode("ascii")
    result = dict(files)
    entries = []
    for entry in manifest.completion.shards if manifest.completion is not None else ():
        name = f"shards/{entry.file}"
        if name in result:
            content = result[name]
            place = content.index(b'"manifest_digest":"') + 19
            result[name] = mutations.resealed(content[:place] + digest + content[place + 64 :])
            entry = dataclasses.replace(entry, digest=result[name][35:99].decode("ascii"))
        entries.append(entry)
    if manifest.completion is not None:
        completion = dataclasses.replace(manifest.completion, shards=tuple(entries))
        manifest = dataclasses.replace(manifest, completion=completion)
    return result | {"manifest.json": manifest.to_json().encode("ascii")}


def _use_manifest(folder: Path, content: bytes) -> None:
    """A manifest alone, then with the shards of an index of it."""
    manifest = store.Manifest.from_json(content.decode("latin-1")) if content.isascii() else None
    path = write_index(folder, {"manifest.json": content})
    manifest = store.load_manifest(path)
    assert manifest is not None
    assert manifest.to_json().encode() == content
    for codec in CODECS:
        differences(manifest, manifest_of(codec))
    assert manifest.dimensions >= 1
    files = index_files(manifest.codec if manifest.codec in CODECS else CODECS[0])
    _use_index(write_index(folder, _renamed_shards(files, manifest)))


def _manifest_seeds() -> list[bytes]:
    plain = manifest_of("float32")
    every = [index_files(codec)["manifest.json"] for codec in CODECS]
    return [*every, plain.to_json().encode("ascii")]


def _codec_of(content: bytes) -> CodecName:
    """The codec of the index that a shard says it is of."""
    for codec in CODECS:
        if manifest_of(codec).identity_digest().encode("ascii") in content[:8192]:
            return codec
    return CODECS[0]


def _use_shard_file(folder: Path, content: bytes) -> None:
    """The second shard of an index whose manifest gives the digest that the shard has."""
    files = dict(index_files(_codec_of(content)))
    manifest = finished_manifest(_codec_of(content))
    assert manifest.completion is not None
    entries = list(manifest.completion.shards)
    digest = content[35:99].decode("latin-1")
    if digest.isascii() and digest.isprintable() and len(digest) == 64:
        entries[1] = dataclasses.replace(entries[1], digest=digest)
    changed = small_index.completed(manifest, shards=tuple(entries))
    unfinished = dataclasses.replace(changed, completion=None)
    alone = {"shards/000001.safetensors": content}
    path = write_index(folder, files | alone | {"manifest.json": changed.to_json().encode("ascii")})
    _each(lambda: store.verify(path), lambda: _read_rows(path, direct=False))
    write_index(folder, files | alone | {"manifest.json": unfinished.to_json().encode("ascii")})
    _each(lambda: store.verify(path), lambda: _read_rows(path, direct=True))
    store.verify(write_index(folder, alone))


def _shard_seeds() -> list[bytes]:
    return [index_files(codec)["shards/000001.safetensors"] for codec in CODECS]


TENSOR_FILES = ("second_moment", "autocorrelation", "whitening", "progress", "derived/train-spectrum")


def _use_tensors(folder: Path, content: bytes) -> None:
    """A tensor file as each of those that an index may have."""
    _any(*(functools.partial(_use_tensors_as, name, folder, content) for name in _kinds(content)))


def _use_tensors_as(name: str, folder: Path, content: bytes) -> None:
    """A tensor file as the one of that name, in an index whose manifest gives its digest."""
    if name == "progress":
        with store.IndexWriter.open(_resumable(folder, content), manifest_of("float32")) as writer:
            writer.load_progress()
        return
    codec: CodecName = "float16" if name == "whitening" else "float32"
    files, manifest = dict(index_files(codec)), finished_manifest(codec)
    digest = content[35:99].decode("latin-1")
    if digest.isascii() and digest.isprintable() and len(digest) == 64:
        manifest = _with_digest(manifest, name, digest)
        files = _renamed_shards(files, manifest)
    path = write_index(folder, files | {f"{name}.safetensors": content})
    store.verify(path)
    _read_tensors(path)


def _kinds(content: bytes) -> tuple[str, ...]:
    """Which files of an index such a file is read as."""
    start = content[:8192]
    return (
        ("progress",) if b"-progress-1" in start else TENSOR_FILES[4:] if b"-derived-1" in start else TENSOR_FILES[:3]
    )


def _with_digest(manifest: store.Manifest, name: str, digest: str) -> store.Manifest:
    """The manifest of an index whose tensor file has this digest."""
    if name == "second_moment":
        return dataclasses.replace(manifest, second_moment=dataclasses.replace(manifest.second_moment, digest=digest))
    if name == "whitening":
        assert manifest.whitening is not None
        return dataclasses.replace(manifest, whitening=dataclasses.replace(manifest.whitening, digest=digest))
    if name == "autocorrelation":
        return small_index.completed(manifest, autocorrelation_digest=digest)
    return manifest


def _resumable(folder: Path, content: bytes) -> Place:
    """An unfinished index with two shards and this file of progress."""
    files = index_files("float32")
    kept = {name: files[name] for name in ("shards/000000.safetensors", "shards/000001.safetensors")}
    manifest = manifest_of("float32").to_json().encode("ascii")
    (folder / "resumed").mkdir(exist_ok=True)
    return write_index(folder / "resumed", kept | {"manifest.json": manifest, "progress.safetensors": content})


def _tensor_seeds() -> list[bytes]:
    plain, whitened = index_files("float32"), index_files("float16")
    return [
        *(plain[f"{name}.safetensors"] for name in TENSOR_FILES if f"{name}.safetensors" in plain),
        whitened["whitening.safetensors"],
    ]


# ---- Corpora, queries, facts, names ---------------------------------------------------------------------------


@functools.cache
def _tokenizer() -> Any:
    return tiny_tokenizer("bos")


def _use_corpus(path: Path, **options: Any) -> None:
    corpus = open_corpus(str(path), **options)
    corpus.description  # noqa: B018 - a property that could raise
    examples = list(corpus.examples())
    assert [example.record for example in examples] == list(range(len(examples)))
    assert [example.text for example in corpus.examples(1)] == [example.text for example in examples[1:]]
    count = corpus.count()
    assert count is not None
    assert count >= len(examples)
    assert len(corpus.sample(2, 0)) == min(2, len(examples))
    corpus.digest()
    _use_metadata(corpus)
    if sum(len(example.text) for example in examples) < 20_000:
        _drain(tokenize_examples(iter(examples), _tokenizer(), window_tokens=16, overlap=2))


def _use_metadata(corpus: Corpus) -> None:
    assert all(isinstance(name, str) for name in corpus.metadata_fields)
    for fields in corpus.metadata():
        assert all(isinstance(value, str) for value in fields.values())


def _packed_name(content: bytes, stem: str, suffix: str = ".jsonl") -> str:
    """The name that the file has by its first bytes, in whatever way it is compressed."""
    packing = ".gz" if content.startswith(b"\x1f\x8b") else ".zst" if content.startswith(b"\x28\xb5\x2f\xfd") else ""
    return f"{stem}{suffix}{packing}"


def _file(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def _use_jsonl(folder: Path, content: bytes) -> None:
    path = _file(folder, _packed_name(content, "corpus"), content)
    text = _file(folder, _packed_name(content, "lines", ".txt"), content)
    _any(
        lambda: _use_corpus(path),
        lambda: _use_corpus(path, id_field="name", limit=3),
        lambda: _use_corpus(text),
    )


def _packings(content: bytes) -> list[bytes]:
    import zstandard

    packed = zstandard.ZstdCompressor(level=1).compress
    return [
        content,
        gzip.compress(content, 1, mtime=0),
        gzip.compress(content[:9], 1, mtime=0) + gzip.compress(content[9:], 1, mtime=0),
        packed(content),
        packed(content[:9]) + packed(content[9:]),
    ]


def _lines(*records: object) -> bytes:
    return b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)


def _jsonl_seeds() -> list[bytes]:
    plain = _lines(
        {"id": "a", "text": "The capital of France is Paris.", "source": "x", "year": 1999, "tags": ["a", {"b": None}]},
        {"id": 7, "text": "Zürich \N{SNOWMAN} and Genève", "source": None, "year": 1.5},
        {"id": "b", "text": "", "extra": {"deep": [[1, 2], [3]]}},
    )
    named = _lines(*({"name": f"n{n}", "sentence_id": f"s{n}", "text": "word " * 9 * n} for n in range(4)))
    return [*_packings(plain), named, b"\xef\xbb\xbf" + named, plain.replace(b"\n", b"\r\n\r\n")]


def _use_queries(folder: Path, content: bytes) -> None:
    path = _file(folder, _packed_name(content, "queries"), content)
    for needed in (True, False):
        for query in read_queries(path, needs_completion=needed):
            query_text(query).encode()
            query.query_id.encode()


def _query_seeds() -> list[bytes]:
    plain = _lines(
        {"id": "a", "prompt": "The capital of France is", "completion": "Paris"},
        {"query_id": 7, "prompt": "", "completion": " x"},
    )
    facts = _lines(
        {"fact_id": "f", "prompt0": "A is", "prompt1": "A:", "entity1": "B", "trex_sentences": ["s"]},
        {"example_id": "e", "inputs_plaintext": "A is", "targets_plaintext": "B"},
    )
    tasks = _lines(
        {"prompt": "A", "completion": "b", "kind": "choice", "alternative": ["c", "d"], "groundtruth": "c"},
        {"premise": "It rained.", "choice1": "A.", "choice2": "B.", "question": "cause", "label": 1, "idx": 4},
        {"goal": "g", "sol1": "s", "sol2": "t", "label": "0"}, {"question": "q", "answer": "#### 1,000"},
        {"ID": "x", "Body": "b", "Question": "q?", "Answer": "9 (apples)"}, {"sQuestion": "s", "lSolutions": [7.5]},
    )  # fmt: skip
    return [*_packings(plain), facts, tasks]


def _use_xml(folder: Path, content: bytes) -> None:
    path = _file(folder, "questions.xml", content)
    _any(lambda: _drain(read_queries(path)), lambda: _drain(read_facts(path)))


def _xml_seeds() -> list[bytes]:
    item = (
        b'<item id="%d" asks-for="effect" most-plausible-alternative="2"><p>It &lt; rained.</p>\n<a1>A.</a1>'
        b"<a2><![CDATA[B & C]]></a2></item>"
    )
    copa = b'<?xml version="1.0"?><!DOCTYPE copa-corpus SYSTEM "copa.dtd"><copa-corpus>%s</copa-corpus>'
    problem = (
        b'<ProblemSet><Problem ID="n" Grade="1"><Body>B.</Body><Question>Q?</Question><Answer>9 (x)</Answer>'
        b"<Formula>7+2=9</Formula></Problem></ProblemSet>"
    )
    entity = copa.replace(b'SYSTEM "copa.dtd"', b'[<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]') % b"<item>&b;</item>"
    return [copa % (item % 1 + item % 2), problem, b"\xef\xbb\xbf" + problem, copa % (item % 1), entity]


def _use_facts(folder: Path, content: bytes) -> None:
    path = _file(folder, _packed_name(content, "facts"), content)
    _any(lambda: _use_read_facts(path), lambda: _drain(read_sentences(path)))


def _use_read_facts(path: Path) -> None:
    facts = read_facts(path)
    for fact in facts:
        fact_digest(fact)
        fact.relation_id.encode()
    names = {name: row for row, name in enumerate(name for fact in facts for name in (*fact.gold, *fact.gold_strict))}
    _any(lambda: to_queries(facts), lambda: evidence(facts, names), lambda: evidence(facts, names, strict=True))


def _fact_seeds() -> list[bytes]:
    release = {
        "fact_id": "f", "entity0": "France", "relation": "capital", "entity1": "Paris", "entity0_alias": ["FR", "F"],
        "entity1_alias": "Lutetia", "entity0_uri": "u", "predicate_uri": "http://x/P36", "entity1_uri": "v",
        "trex_sentences": ["s1", 2], "c4_frequency": 3, "is_repetition": False, "prompt0": "a", "prompt1": "b",
        "prompt2": "c",
    }  # fmt: skip
    own = {
        "fact_id": 9, "subject": "France", "subject_id": "Q1", "subject_aliases": [], "relation": "r",
        "relation_id": "P1", "object": "Paris", "object_id": "Q2", "object_aliases": ["x"], "gold": ["a"],
        "gold_strict": ["a"], "coref": ["b"], "maybe_gold": ["c"], "prompt": "p", "prompt_no_colon": "q",
        "prompt_reworded": "r", "completion": "Paris!", "answer_in_subject": None,
    }  # fmt: skip
    sentence = {"sentence_id": "s", "text": "t", "abstract_uri": "u", "sent_idx_in_abst": 2.0, "fact_triples": [["a"]]}
    return [_lines(release), _lines(own), _lines(release, own), *_packings(_lines(sentence))]


def _use_names(folder: Path, content: bytes) -> None:
    assert all(name.strip() for name in read_names(_file(folder, "names.txt", content)))


# ---- Parquet --------------------------------------------------------------------------------------------------


def _use_parquet(folder: Path, content: bytes) -> None:
    path = _file(folder, "corpus.parquet", content)
    _any(lambda: _use_corpus(path), lambda: _use_corpus(path, text_field="source", id_field="year", limit=3))


def _parquet_seeds() -> list[bytes]:
    texts = ["The capital of France is Paris.", "Zürich \N{SNOWMAN}", "", "word " * 9]
    columns: dict[str, Any] = {
        "text": texts,
        "id": ["a", "b", "c", "d"],
        "source": ["x", None, "x", "y"],
        "year": [1, None, 3, 4],
    }
    plain = pa.table(columns)
    typed = pa.table(
        {
            "text": pa.array(texts, pa.large_string()),
            "year": pa.array([0, 1, None, 2**40], pa.timestamp("us", "Europe/Zurich")),
            "source": pa.array(texts).dictionary_encode(),
            "day": pa.array([0, None, 2, 3], pa.date32()),
            "span": pa.array([1, 2, 3, None], pa.duration("ms")),
            "time": pa.array([1, 2, 3, None], pa.time64("us")),
            "sum": pa.array([1, 2, None, 4], pa.decimal128(9, 2)),
            "list": pa.array([["a"], None, [], ["b", None]], pa.list_(pa.string())),
            "map": pa.array([[("a", 1)], None, [], []], pa.map_(pa.string(), pa.int32())),
            "nested": pa.array([{"a": 1, "b": [2.5]}] * 4),
            "raw": pa.array([b"\xff", None, b"", b"x"]),
            "flag": [True, None, False, True],
            "small": pa.array([1, 2, 3, 4], pa.uint8()),
            "half": pa.array(np.array([1, 2, 3, 4], np.float16)),
        }
    )
    seeds = [
        _parquet(plain, compression=compression, row_group_size=2, use_dictionary=dictionary)
        for compression, dictionary in (("none", True), ("snappy", False), ("gzip", True), ("zstd", False))
    ]
    seeds += [
        _parquet(plain, compression="none", use_dictionary=False, store_schema=False, write_page_checksum=True),
        _parquet(plain, compression="none", use_dictionary=False, version="1.0", data_page_version="2.0"),
        _parquet(typed.select(["text", "year", "source"]), compression="none"),
        _parquet(typed.select(["text", "list", "map", "nested"]), compression="none", store_schema=False),
        _parquet(typed.select(["text", "day", "span", "time", "sum"]), compression="none"),
        _parquet(typed.select(["text", "raw", "flag", "small", "half"]), compression="none"),
        _parquet(pa.table({"text": pa.array([b"ab", b"\xc3\xa4"])}), compression="none", store_schema=False),
        _parquet(pa.table([pa.array(texts), pa.array(texts)], names=["text", "text"]), compression="none"),
        _parquet(pa.table([pa.array(texts), pa.array([1, 2, 3, 4])], names=["text", "a.b"]), compression="none"),
    ]
    return seeds


def _parquet(table: pa.Table, **options: Any) -> bytes:
    stream = io.BytesIO()
    pq.write_table(table, stream, **options)
    return stream.getvalue()


# ---- Results, the report beside them --------------------------------------------------------------------------


def _use_results(folder: Path, content: bytes) -> None:
    path = _file(folder, _packed_name(content, "results"), content)
    file = read_result_file(path)
    sorts: tuple[Any, ...] = ("file", "prompt", "relation", "frequency", "score", "rank")
    for sort in sorts:
        wanted = QueryFilter(search="a", search_candidates=True, sort=sort, descending=sort == "score")
        query_page([file], 0, wanted, offset=0, limit=50).model_dump_json()
    shown = []
    for place, line in enumerate(file.lines[:20]):
        record = query_record(file, 0, place)
        record.model_dump_json()
        file.json_line(place).encode()
        if record.proponents:
            candidate_text(file, place, "proponents", 1)
        if record.opponents:
            candidate_text(file, place, "opponents", len(record.opponents))
        lists = [("m", "proponent", record.proponents), ("m", "opponent", record.opponents)]
        shown.append(ExportedQuery(line.example_id, line.prompt, line.completion, lists))
    for written in (to_csv(shown), to_jsonl(shown), to_html(shown, file.name)):
        "".join(written).encode()


def _result_seeds() -> list[bytes]:
    release = {
        "example_id": "e", "query_set": "s", "inputs_plaintext": "The capital of France is",
        "targets_plaintext": "Paris", "relation": "capital", "c4_frequency": 3, "c4_frequency_bucket": "1-10",
        "is_8b_correct": True, "proponents": ["Paris is in France.", "x"], "proponent_ids": ["a#1", 2],
        "proponent_scores": [0.5, -1], "proponent_correct": [True, False], "proponent_ais_scores": [0.9, 0.1],
        "opponents": ["y"], "opponent_ids": ["o"], "opponent_scores": [-0.25], "trex_sentences": ["a"],
        "entity0": "France", "entity0_alias": ["FR"], "entity1": "Paris", "entity1_alias": None, "groundtruth": "Paris",
        "kind": "choice", "alternative": ["Rome"], "model_answer": "Paris", "8b_generations": ["Paris", "Rome"],
        "8b_confidence": 0.5, "has_trex_sentence": True,
    }  # fmt: skip
    small = {"prompt": "a", "completion": "b", "proponents": [], "proponent_ids": [], "proponent_scores": []}
    return [*_packings(_lines(release, small)), _lines(small)]


def _use_report(folder: Path, content: bytes) -> None:
    """The report that lies beside results."""
    path = _file(folder, "asked.jsonl", _result_seeds()[-1])
    _file(folder, "asked.report.json", content)
    file = read_result_file(path)
    if file.mixing is not None:
        file.mixing.model_dump_json()


def _report_seeds() -> list[bytes]:
    mixing = {
        "value": 0.1, "rule": "given", "queries": 3, "rank": 2, "evaluation_value": 0.5, "train_value": 0.25,
        "evaluation_spectrum": [3.0, 2.0, 1.0], "train_spectrum": [2.0, 1.5],
    }  # fmt: skip
    few = {"value": 0.0, "rule": "only R_train", "queries": 1, "rank": None}
    return [
        _lines({"mixing": mixing, "damping": 0.01, "damping_rule": "shrinkage"}),
        _lines({"mixing": few, "damping": 0.0, "damping_rule": "given"}),
    ]


# ---- Optimizer state, settings --------------------------------------------------------------------------------


@functools.cache
def _model() -> LanguageModel:
    module = tiny_model(
        "llama", vocabulary=20, num_hidden_layers=1, hidden_size=4, intermediate_size=6, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    return wrap_model(module, _tokenizer(), layer_blocks=1)


def _use_optimizer(folder: Path, content: bytes) -> None:
    """As `optimizer.safetensors`, or what torch.save wrote."""
    torch_file = content[:2] == b"PK" or content[:1] == b"\x80"
    path = _file(folder, f"optimizer.{'pt' if torch_file else 'safetensors'}", content)
    _each(lambda: _use_state(path, "factored"), lambda: _use_state(path, "elementwise"))


def _use_state(path: Path, kind: Any) -> None:
    moment = second_moment_from_state(path, _model(), kind=kind)
    for tensor in moment.tensors().values():
        tensor.sum().item()


def _states() -> Iterator[dict[str, Any]]:
    """What optimizers keep of each parameter by name: Adam's, and both kinds of Adafactor's."""
    parameters = dict(_model().module.named_parameters())
    yield {name: {"step": torch.tensor(3.0), "exp_avg_sq": torch.ones_like(p)} for name, p in parameters.items()}
    yield {
        name: {"exp_avg_sq_row": torch.ones(p.shape[:-1]), "exp_avg_sq_col": torch.ones(*p.shape[:-2], p.shape[-1])}
        for name, p in parameters.items()
        if p.ndim == 2
    }
    yield {
        name: {"step": 2, "row_var": torch.ones(len(p), 1), "col_var": torch.ones(1, p.shape[1])}
        for name, p in parameters.items()
        if p.ndim == 2
    }


def _optimizer_seeds() -> list[bytes]:
    from safetensors.torch import save

    seeds = []
    names = [name for name, _ in _model().module.named_parameters()]
    for state in _states():
        flat = {
            f"{key}/{name}": value if isinstance(value, Tensor) else torch.tensor(float(value))
            for name, kept in state.items()
            for key, value in kept.items()
        }
        seeds.append(save(flat, metadata={"betas": "[0.9, 0.999]"}))
        numbered = {names.index(name): kept for name, kept in state.items()}
        group: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.99), "params": list(range(len(names)))}
        seeds.append(_torch_saved({"state": numbered, "param_groups": [group]}))
        seeds.append(_torch_saved({"state": numbered, "param_groups": [{**group, "param_names": names}]}))
    small = {"state": {}, "param_groups": [{"params": []}]}
    return [*seeds, _torch_saved(small), _torch_saved(small, _use_new_zipfile_serialization=False)]


def _torch_saved(content: object, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


def _mutated_optimizer(content: bytes, generator: Any, change_bytes: Mutation = mutations.havoc) -> bytes:
    if content[:2] == b"PK":
        return mutations.mutated_zip(content, generator, change_bytes)
    if content[:1] == b"\x80":
        return change_bytes(content, generator)
    return mutations.mutated_safetensors(content, generator, change_bytes)


@functools.cache
def _model_files() -> Mapping[str, bytes]:
    """A tiny model's folder."""
    with scratch() as folder:
        save_tiny_model(Path(folder), vocabulary=300, num_hidden_layers=1)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def _use_model(folder: Path, content: bytes) -> None:
    """A model's configuration, or a tokenizer's."""
    path = folder / "model"
    path.mkdir(exist_ok=True)
    name = "tokenizer_config.json" if b'"tokenizer_class"' in content else "config.json"
    for each, there in _model_files().items():
        (path / each).write_bytes(content if each == name else there)
    load_model(path, layer_blocks=1)


def _model_seeds() -> list[bytes]:
    return [_model_files()[name] for name in ("config.json", "tokenizer_config.json")]


def _use_config(folder: Path, content: bytes) -> None:
    read_config(_file(folder, "report.toml", content))


def _config_seeds() -> list[bytes]:
    return [
        b'model = "m"\ncorpus = "c.jsonl"\nfacts = "f.jsonl"\n',
        b'model = "org/m"\ncorpus = "c"\nfacts = "f"\ntext_field = "t"\nid_field = "i"\nlimit = 10\nqueries = 5\n'
        b'half = "report"\nmethods = ["gold", "TrackStar", "BM25"]\ntemplates = [0, 1]\nstrict = true\ntop_k = 7\n'
        b'side = [8, 4]\ncheckpoints = ["a", "b"]\nsecond_moment = "estimate"\ndamping = 0.5\ncodec = "float32"\n'
        b'batch_tokens = 64\ndevice = "cpu"\nseed = 3\n[tail_patch]\nmethods = ["gold"]\nqueries = 2\ntop_k = [1, 3]\n'
        b'learning_rate = [0.1, 1]\npath = "exact"\n',
        b'model = "./m"\ncorpus = "~/c"\nfacts = """f"""\nsecond_moment = "x/y.pt"\nembedding_model = "e"\n'
        b'entailment_model = "n"\n# 2020-01-01T00:00:00Z\n',
    ]


# ---- Audits ---------------------------------------------------------------------------------------------------


def _use_audit(folder: Path, content: bytes) -> None:
    """An audit beside results, alone and with all that it may be compared with."""
    path = _file(folder, "asked.audit.json", content)
    results = _file(folder, "asked.jsonl", _result_seeds()[0])
    index = write_index(folder, index_files("float32"))
    corpus = _file(folder, "corpus.jsonl", _jsonl_seeds()[0])
    queries = _file(folder, "queries.jsonl", _query_seeds()[0])
    _any(
        lambda: _told(path, AtHand()),
        lambda: _told(path, AtHand(results=results, queries=queries, task=queries)),
        lambda: _told(path, AtHand(results=results, data=[str(corpus)])),
        lambda: _told(path, AtHand(results=results, index=str(index))),
    )


def _told(path: Path, hand: AtHand) -> None:
    for check in check_audit(path, hand, progress=False).checks:
        printable(f"{check.name} {check.said}").encode()


def _audit_seeds() -> list[bytes]:
    manifest = finished_manifest("float32")
    assert manifest.completion is not None
    index = IndexEntry(
        path="index",
        identity=manifest.identity_digest(),
        content=content_digest(manifest),
        manifest_file="0" * 64,
        r_train=manifest.completion.autocorrelation_digest,
    )
    stream = StreamEntry(
        second_moment="estimate", second_moment_examples=3, whitening_examples=4, r_train_examples=5, r_train="0" * 64
    )
    asked = QueriesEntry(count=2, digest="0" * 64)
    question = QuestionEntry.of(None, top=3, mixing=None, damping=None, batch_tokens=64, reranked=5)
    plain = Audit(
        audit_version=AUDIT_VERSION,
        results=ResultsEntry(file="asked.jsonl", digest="0" * 64, query_set="queries"),
        queries=asked,
        generation=None,
        question=question,
        answer=AnswerEntry(mixing=0.5, damping=0.1, candidates=8, codec="float32", reranked=5),
        made_with=dataclasses.replace(manifest, completion=None),
        index=index,
        stream=None,
        versions=VersionsEntry.installed(),
        device="cpu",
        threads=1,
    )
    passed = dataclasses.replace(
        plain,
        index=None,
        stream=stream,
        generation=GenerationEntry(
            max_new_tokens=4, temperature=0.5, top_p=0.9, sampling_seed=1, stop="line", chat=False, prompts=asked
        ),
        question=dataclasses.replace(question, mixing=0.25, damping=0.0, task=asked, prompt_field="prompt"),
    )
    return [audit.to_json().encode("ascii") for audit in (plain, passed)]


READERS: dict[str, Reader] = {
    reader.name: reader
    for reader in (
        Reader(
            name="manifest", use=_use_manifest, seeds=_manifest_seeds, mutate=mutations.mutated_manifest, longest=8192
        ),
        Reader(
            name="shard", use=_use_shard_file, seeds=_shard_seeds, mutate=mutations.mutated_tensor_file, longest=20_000
        ),
        Reader(name="jsonl", use=_use_jsonl, seeds=_jsonl_seeds, mutate=mutations.mutated_lines),
        Reader(name="parquet", use=_use_parquet, seeds=_parquet_seeds, mutate=mutations.mutated_parquet, longest=8192),
        Reader(name="results", use=_use_results, seeds=_result_seeds, mutate=mutations.mutated_lines),
        Reader(
            name="tensors", use=_use_tensors, seeds=_tensor_seeds, mutate=mutations.mutated_tensor_file, longest=40_000
        ),
        Reader(name="optimizer", use=_use_optimizer, seeds=_optimizer_seeds, mutate=_mutated_optimizer, longest=16_384),
        Reader(name="queries", use=_use_queries, seeds=_query_seeds, mutate=mutations.mutated_lines),
        Reader(name="xml", use=_use_xml, seeds=_xml_seeds, mutate=mutations.mutated_text),
        Reader(name="facts", use=_use_facts, seeds=_fact_seeds, mutate=mutations.mutated_lines),
        Reader(name="report", use=_use_report, seeds=_report_seeds, mutate=mutations.mutated_lines),
        Reader(name="audit", use=_use_audit, seeds=_audit_seeds, mutate=mutations.mutated_audit, longest=8192),
        Reader(name="names", use=_use_names, seeds=lambda: [b"a\nb#1\n\xc3\xa4\r\n", b"\xef\xbb\xbfa"], longest=1024),
        Reader(name="model", use=_use_model, seeds=_model_seeds, mutate=mutations.mutated_json),
        Reader(name="config", use=_use_config, seeds=_config_seeds, mutate=mutations.mutated_text),
    )
}
"""Every reader by name, those first that read what others send."""


def free() -> None:
    """Give back what cycles keep, such as mapped files."""
    gc.collect()
