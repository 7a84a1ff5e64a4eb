"""Add a corpus to an index; gradients are computed for the new examples only.

The new examples are indexed with the settings of the existing index (model, V, projections,
W_train, codec), in a folder inside the new index. The two indexes are then merged. An interrupted
run is resumed.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from trackstar.choices import DeviceMap, DuplicateIds, Join, RecordFormat, TrainOn
from trackstar.corpus import Corpus, open_corpus
from trackstar.corpus.marked_text import first_example
from trackstar.curvature.task import train_whitening
from trackstar.editing.duplicates import added_corpus
from trackstar.editing.merging import merged_manifest
from trackstar.editing.rewriting import check_apart, write_rows
from trackstar.indexing.provenance import corpus_entry
from trackstar.indexing.shard_writing import RowWork, check_resumed, rows_by, write_shards
from trackstar.model.language_model import LanguageModel
from trackstar.progress import Progress
from trackstar.store import Index, IndexWriter, Manifest, Place, as_folder, load_manifest, part_folder
from trackstar.store.files.outputs import inputs, refuse_input_folder
from trackstar.store.locations import recorded_model, relocated
from trackstar.workers.index_model import model_of_index, second_moment_of_index
from trackstar.workers.protocol import THIS_PROCESS
from trackstar.workers.setups import GradientSetup


def add_examples(
    index: Index | str | Place,
    data: object,
    out: str | Place,
    *,
    model: LanguageModel | str | Path | None = None,
    text_field: str = "text",
    id_field: str | None = None,
    limit: int | None = None,
    duplicate_ids: DuplicateIds = "refuse",
    format: RecordFormat | None = None,
    train_on: TrainOn | None = None,
    join: Join = "auto",
    chat_template: str | Path | None = None,
    metadata: str | Sequence[str] = "all",
    device: str = "auto",
    device_map: DeviceMap | Mapping[str, str] | None = None,
    batch_tokens: int = 2048,
    progress: bool = True,
) -> Index:
    """Make an index of an existing index's examples and those of a further corpus.

    In projected coordinates R_train becomes the mean over all examples; in whitened coordinates
    W_train is unchanged. If the run is interrupted, the same call resumes it.

    Args:
        index: The existing index; it is not changed.
        data: The further corpus; see `open_corpus`.
        out: Folder of the new index.
        model: The indexed model, loaded or as a path; None loads it from the path that the index
            records.
        text_field: Field that holds the text.
        id_field: Field that holds an example's id; None detects it.
        limit: Most records to read; None reads all.
        duplicate_ids: What is done with a record whose name an earlier record or an example of the
            index has: `refuse` raises, `number` names it `NAME~2`. Records without a name are named
            after their position behind the index's records.
        format: Form of the records; None finds it. See `open_corpus`.
        train_on: Which tokens are targets; None is what training of the format counts. See
            `open_corpus`.
        join: What is put between prompt and completion.
        chat_template: File with the chat template; None is the index's, or else the tokenizer's own.
        metadata: Fields that are kept with the index; see `open_corpus`.
        device: Device that computes gradients, if the model is not loaded yet; see `load_model`.
        device_map: Spreads the model over several GPUs; see `load_model`.
        batch_tokens: Most tokens per batch, padding included.
        progress: Whether progress is shown.

    Returns:
        The new index, opened.

    Raises:
        IndexMismatchError: The model is not the indexed one, or `out` holds another index.
        OptionError: `out` is the existing index or lies in it, or the index already contains this
            corpus.
        TrackstarError: A file cannot be read or written; see `trackstar.errors`.
    """
    index = Index.of(index)
    check_apart(out, [index])
    recorded = recorded_model(index.manifest, index.path)
    refuse_input_folder(out, inputs(data=data, model=recorded if model is None else model))
    completion = index.manifest.completion
    assert completion is not None, "an open index is finished"
    opened = open_corpus(
        data, text_field=text_field, id_field=id_field, limit=limit, duplicate_ids=duplicate_ids, format=format,
        train_on=train_on, join=join, chat_template=chat_template, metadata=metadata,
    )  # fmt: skip
    opened = _in_template(opened, index.manifest)
    pack = index.manifest.windows.pack
    indexed_model = None
    if opened.needs_tokenizer or pack is not None:
        indexed_model = model_of_index(index, model, device=device, device_map=device_map)
        opened = opened.for_tokenizer(indexed_model.tokenizer, pack=pack)
    corpus = added_corpus(index, opened)
    folder = as_folder(out)
    copied = relocated(index.manifest, index.path, folder)
    added = dataclasses.replace(copied, corpora=(corpus_entry(corpus, folder),), removed=None)
    extended = merged_manifest([copied, added], [completion.records])
    existing = load_manifest(out)
    # A model that does not fit is refused before a folder is made.
    unfinished = existing is None or existing.completion is None
    if unfinished and indexed_model is None:
        indexed_model = model_of_index(index, model, device=device, device_map=device_map)
    with (
        Progress("Adding", unit="examples", shown=progress) as bar,
        IndexWriter.open(out, extended, on_note=bar.note) as writer,
    ):
        for line in corpus.survey().notes(corpus.name):
            bar.note(line)
        if not writer.completed:
            indexed_model = indexed_model or model_of_index(index, model, device=device, device_map=device_map)
            part = part_folder(folder)
            with IndexWriter.open(part, added, on_note=bar.note, whole=True) as part_writer:
                check_resumed(part_writer, indexed_model)
                if not part_writer.completed:
                    _index_corpus(part_writer, index, indexed_model, corpus, batch_tokens=batch_tokens, bar=bar)
            write_rows(writer, [index, Index.open(part)], bar=bar)
    return Index.open(out)


def _in_template(corpus: Corpus, manifest: Manifest) -> Corpus:
    """The corpus in the index's chat template, unless it has its own; instructions if the index's are."""
    form = corpus.reading.format
    if corpus.template is not None or not (
        form == "messages" or (form == "instruction" and manifest.instructions_in_template)
    ):
        return corpus
    reading = dataclasses.replace(corpus.reading, chat_template="")
    return dataclasses.replace(corpus, template=manifest.chat_template, reading=reading)


def _index_corpus(
    writer: IndexWriter, index: Index, model: LanguageModel, corpus: Corpus, *, batch_tokens: int, bar: Progress
) -> None:
    """Index a corpus with the V, projections, W_train and codec of an existing index."""
    manifest, second_moment = writer.manifest, second_moment_of_index(index)
    windows = manifest.windows
    shown = first_example(corpus, model.tokenizer, windows.tokens, truncate=windows.truncate)
    if shown is not None:
        bar.note(shown)
    if manifest.second_moment.digest is not None:
        writer.write_tensors("second_moment", index.tensors("second_moment"))
    w_train = None
    if manifest.whitening is not None:
        w_train = train_whitening(index)
        writer.write_tensors("whitening", w_train.tensors())
    setup = GradientSetup(manifest=manifest, second_moment=second_moment, batch_tokens=batch_tokens)
    make_rows = rows_by(THIS_PROCESS, model, setup, RowWork.of(manifest, w_train), bar)
    end = write_shards(writer, corpus, model, make_rows, advance=bar.advance)
    writer.finish(records=end.record, skipped=end.skipped)
