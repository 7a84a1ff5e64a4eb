"""An index with further examples: only their gradients are computed (design.md, "Beyond the paper").

The new examples become an index made like the old one (same model, V, projections, W_train, codec), kept within the new
folder until it is finished; then the two are merged. An interrupted run goes on where it was.
"""

import dataclasses
from pathlib import Path

from trackstar.corpus import Corpus, open_corpus
from trackstar.curvature.task import train_whitening
from trackstar.editing.duplicates import check_new
from trackstar.editing.merging import joined_manifest
from trackstar.editing.rewriting import check_apart, write_rows_of
from trackstar.indexing.provenance import corpus_entry
from trackstar.indexing.shard_writing import RowWork, rows_by, write_shards
from trackstar.model.language_model import LanguageModel
from trackstar.progress import Progress
from trackstar.store import PART_FOLDER, Index, IndexWriter, Place, as_folder, load_manifest
from trackstar.workers.made_with import model_of_index, second_moment_of_index
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
    device: str = "cpu",
    batch_tokens: int = 2048,
    progress: bool = True,
) -> Index:
    """Make the index that holds the examples of another one and those of a further corpus.

    In projected coordinates R_train becomes the mean over all of them; in whitened ones W_train stays what it was.

    Args:
        index: The index that is there; it is left as it is.
        data: The further corpus; see `open_corpus`.
        out: The new index's folder.
        model: The model that was indexed, loaded or where to load it from; None is where the index says it was.
        text_field: The field that holds the text.
        id_field: The field that names an example; None finds it.
        limit: Most records to read.
        device: Where gradients are computed.
        batch_tokens: Most tokens of a batch, padding included.
        progress: Whether progress is shown where stderr is a terminal.

    Returns:
        The new index, opened.

    Raises:
        IndexMismatchError: The model is not the one that was indexed, or the new folder holds another index.
        OptionError: The new folder is the old one or in it, or the index has been made of this corpus.
        TrackstarError: Something cannot be read or written; see `trackstar.errors`.
    """
    index = index if isinstance(index, Index) else Index.open(index)
    check_apart(out, [index])
    completion = index.manifest.completion
    assert completion is not None, "an open index is finished"
    corpus = open_corpus(data, text_field=text_field, id_field=id_field, limit=limit)
    entry = corpus_entry(corpus)
    check_new(index, corpus, entry)
    added = dataclasses.replace(index.manifest, corpora=(entry,), removed=None, completion=None)
    grown = joined_manifest([index.manifest, added], [completion.records])
    there = load_manifest(out)
    # A model that does not fit is refused before a folder is made.
    fits = model_of_index(index, model, device=device) if there is None or there.completion is None else None
    with (
        Progress("Adding", unit="examples", shown=progress) as bar,
        IndexWriter.open(out, grown, on_note=bar.note) as writer,
    ):
        if not writer.completed:
            fits = fits or model_of_index(index, model, device=device)
            part = as_folder(out) / PART_FOLDER
            with IndexWriter.open(part, added, on_note=bar.note, whole=True) as part_writer:
                if not part_writer.completed:
                    _fill(part_writer, index, fits, corpus, batch_tokens=batch_tokens, bar=bar)
            write_rows_of(writer, [index, Index.open(part)], bar=bar)
    return Index.open(out)


def _fill(
    writer: IndexWriter, index: Index, model: LanguageModel, corpus: Corpus, *, batch_tokens: int, bar: Progress
) -> None:
    manifest, moment = writer.manifest, second_moment_of_index(index)
    if manifest.second_moment.digest is not None:
        writer.write_tensors("second_moment", index.tensors("second_moment"))
    train = None
    if manifest.whitening is not None:
        train = train_whitening(index)
        writer.write_tensors("whitening", {"whitening": train.factors})
    setup = GradientSetup(manifest=manifest, second_moment=moment, batch_tokens=batch_tokens)
    make_rows = rows_by(THIS_PROCESS, model, setup, RowWork.of(manifest, train), bar)
    end = write_shards(writer, corpus, model, make_rows, advance=bar.advance)
    writer.finish(records=end.record, skipped=end.skipped)
