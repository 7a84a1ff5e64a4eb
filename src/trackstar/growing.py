"""An index with further examples: only their gradients are computed (design.md, "Beyond the paper").

The new examples become an index made like the old one (same model, V, projections, W_train, codec), kept within the new
folder until it is finished; then the two are merged. An interrupted run goes on where it was.
"""

import dataclasses
from pathlib import Path

from trackstar.correction import train_whitening
from trackstar.errors import OptionError
from trackstar.examples import Corpus, open_corpus
from trackstar.indexing import RowMaker, projector_of, write_shards
from trackstar.model import LanguageModel
from trackstar.progress import Progress
from trackstar.provenance import corpus_entry, model_of_index, second_moment_of_index
from trackstar.rewriting import check_apart, merge_indexes
from trackstar.store import PART_FOLDER, Index, IndexWriter, load_manifest


def add_examples(
    index: Index | str | Path,
    data: object,
    out: str | Path,
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
        IndexMismatchError: The model is not the one that was indexed.
        OptionError: The new folder is the old one or in it, or holds an index of other corpora.
        TrackstarError: Something cannot be read or written; see `trackstar.errors`.
    """
    index = index if isinstance(index, Index) else Index.open(index)
    out = Path(out)
    check_apart(out, [index])
    corpus = open_corpus(data, text_field=text_field, id_field=id_field, limit=limit)
    entry = corpus_entry(corpus)
    part = out / PART_FOLDER
    there = load_manifest(out)
    if there is not None and there.completion is not None:
        if [corpus.digest for corpus in there.corpora] != [
            *(old.digest for old in index.manifest.corpora),
            entry.digest,
        ]:
            raise OptionError(f"--out {out}: holds an index of other corpora, expected an empty folder")
        return Index.open(out)
    model = model_of_index(index, model, device=device)
    manifest = dataclasses.replace(index.manifest, corpora=(entry,), removed=None, completion=None)
    with (
        Progress("Adding", unit="examples", shown=progress) as bar,
        IndexWriter.open(part, manifest, on_note=bar.note) as writer,
    ):
        if not writer.completed:
            _fill(writer, index, model, corpus, batch_tokens=batch_tokens, bar=bar)
    return merge_indexes([index, part], out, progress=progress)


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
    with projector_of(manifest, model, moment, batch_tokens=batch_tokens, note=bar.note) as projector:
        end = write_shards(writer, corpus, model, RowMaker(projector, manifest, train), advance=bar.advance)
    writer.finish(records=end.record, skipped=end.skipped)
