"""Build an index: a corpus and a model give φ of every training example, and R_train or W_train (Eq. 2-4)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from trackstar.choices import (
    CodecName,
    Coordinates,
    DeviceMap,
    Dtype,
    DuplicateIds,
    Join,
    Output,
    Parameters,
    Preset,
    ProjectionKind,
    RecordFormat,
    SecondMomentKind,
    TrainOn,
)
from trackstar.corpus import Corpus, open_corpus
from trackstar.gradients.second_moment import SecondMoment
from trackstar.indexing.array_tasks import Share, index_share
from trackstar.indexing.job import IndexJob, prepare
from trackstar.indexing.plan import plan_corpus
from trackstar.indexing.settings import ChosenSettings, IndexSettings
from trackstar.indexing.shard_writing import check_resumed
from trackstar.model.language_model import LanguageModel, load_model
from trackstar.progress import Progress
from trackstar.store import Index, IndexWriter, Place, as_folder, refuse_foreign_folder
from trackstar.store.files.outputs import inputs, refuse_input_folder
from trackstar.workers.protocol import THIS_PROCESS, Workers

_DEFAULT = IndexSettings()


def build_index(
    model: LanguageModel | str | Path,
    data: object,
    out: str | Place,
    *,
    text_field: str = "text",
    id_field: str | None = None,
    limit: int | None = None,
    duplicate_ids: DuplicateIds = "refuse",
    format: RecordFormat | None = None,
    train_on: TrainOn | None = None,
    join: Join = "auto",
    chat_template: str | Path | None = None,
    metadata: str | Sequence[str] = "all",
    window_tokens: int | None = _DEFAULT.window_tokens,
    overlap: int = _DEFAULT.overlap,
    truncate: bool = _DEFAULT.truncate,
    pack: int | None = _DEFAULT.pack,
    revision: str | None = None,
    gguf_file: str | None = None,
    parameters: Parameters = "merged",
    dtype: Dtype = "float32",
    device: str = "auto",
    device_map: DeviceMap | Mapping[str, str] | None = None,
    attention_pattern: str | None = None,
    mlp_pattern: str | None = None,
    layer_blocks: int = 8,
    second_moment: str | Path | SecondMoment = _DEFAULT.second_moment,
    second_moment_kind: SecondMomentKind = _DEFAULT.second_moment_kind,
    second_moment_examples: int = _DEFAULT.second_moment_examples,
    preset: Preset | None = _DEFAULT.preset,
    side: int | None = _DEFAULT.side,
    seed: int = _DEFAULT.seed,
    codec: CodecName | None = _DEFAULT.codec,
    coordinates: Coordinates | None = _DEFAULT.coordinates,
    whitening_examples: int = _DEFAULT.whitening_examples,
    damping: float | None = _DEFAULT.damping,
    shard_examples: int | None = _DEFAULT.shard_examples,
    batch_tokens: int = _DEFAULT.batch_tokens,
    output: Output = _DEFAULT.output,
    projection: ProjectionKind = _DEFAULT.projection,
    share: Share | str | None = None,
    workers: Workers = THIS_PROCESS,
    progress: bool = True,
) -> Index:
    """Index a corpus: φ = P(∇Loss/√V) of every training example, and R_train (Eq. 2-4).

    A plan is printed first, as `plan_index` makes it; too little memory or disk is refused before anything
    is written. The same call resumes an interrupted run; it opens an index that is already finished.

    Args:
        model: A loaded model, or the folder, hub name or `.gguf` file to load one from; a folder may hold
            a PEFT adapter.
        data: The corpus; see `open_corpus`.
        out: The index's folder or URL.
        text_field: Field that holds the text.
        id_field: Field that names an example; None searches for one.
        limit: Most records to read.
        duplicate_ids: Whether a second record of a name is refused, or named `NAME~2`; see
            `open_corpus`.
        format: Form of the records; None finds it. See `open_corpus`.
        train_on: Which tokens are targets; None is what training of the format counts. See
            `open_corpus`.
        join: What is put between prompt and completion.
        chat_template: File with the chat template; None is the tokenizer's own.
        metadata: Fields that are kept with the index: `all` that are not read otherwise, `none`, or
            their names.
        window_tokens: See `IndexSettings`, as for every parameter without a description here.
        overlap: See `IndexSettings`.
        truncate: See `IndexSettings`.
        pack: See `IndexSettings`.
        revision: Revision of a hub's model.
        gguf_file: Name of the file with GGUF weights, if the model's folder holds several.
        parameters: See `load_model`; a loaded model has its own.
        dtype: Number format of the gradient computation, `float32` or `bfloat16`.
        device: Device that computes gradients, if the model is not loaded yet; see `load_model`.
        device_map: Spreads the model over several GPUs; see `load_model`.
        attention_pattern: See `find_layer_blocks`.
        mlp_pattern: See `find_layer_blocks`.
        layer_blocks: Number of blocks for each of attention and MLP (8 in the paper).
        second_moment: See `IndexSettings`.
        second_moment_kind: See `IndexSettings`.
        second_moment_examples: See `IndexSettings`.
        preset: See `IndexSettings`.
        side: See `IndexSettings`.
        seed: See `IndexSettings`.
        codec: See `IndexSettings`.
        coordinates: See `IndexSettings`.
        whitening_examples: See `IndexSettings`.
        damping: See `IndexSettings`.
        shard_examples: See `IndexSettings`.
        batch_tokens: See `IndexSettings`.
        output: See `IndexSettings`.
        projection: See `IndexSettings`.
        share: `i/n` makes the i-th of n parts of one index, independently of the other parts; see
            `array_tasks.py`. `finish_index` completes the index.
        workers: This process, or a cluster's workers (`trackstar.workers.RayWorkers`).
        progress: Whether progress is shown: bars on a terminal, elsewhere a line every 30 seconds.

    Returns:
        The finished index, opened; with `share`, the index as far as it is finished.

    Raises:
        TrackstarError: Something cannot be read, used or written; see `trackstar.errors`.
    """
    settings = IndexSettings(
        window_tokens=window_tokens, overlap=overlap, truncate=truncate, pack=pack, second_moment=second_moment,
        second_moment_kind=second_moment_kind, second_moment_examples=second_moment_examples, preset=preset, side=side,
        seed=seed, output=output, projection=projection, codec=codec, coordinates=coordinates, damping=damping,
        whitening_examples=whitening_examples, shard_examples=shard_examples, batch_tokens=batch_tokens,
    )  # fmt: skip
    if not isinstance(model, LanguageModel):
        model = load_model(
            model, revision=revision, gguf_file=gguf_file, parameters=parameters, dtype=dtype, device_map=device_map,
            device=device, attention_pattern=attention_pattern, mlp_pattern=mlp_pattern, layer_blocks=layer_blocks,
        )  # fmt: skip
    corpus = open_corpus(data, text_field=text_field, id_field=id_field, limit=limit, duplicate_ids=duplicate_ids,
        format=format, train_on=train_on, join=join, chat_template=chat_template, metadata=metadata,
        tokenizer=model.tokenizer)  # fmt: skip
    return index_corpus(model, corpus, out, settings, share=share, workers=workers, progress=progress)


def index_corpus(
    model: LanguageModel,
    corpus: Corpus,
    out: str | Place,
    settings: IndexSettings,
    *,
    share: Share | str | None = None,
    workers: Workers = THIS_PROCESS,
    progress: bool = True,
    planned: bool = True,
) -> Index:
    """Index an opened corpus with a loaded model; see `build_index`.

    Args:
        model: The model.
        corpus: The corpus.
        out: The index's folder or URL.
        settings: What the index is asked to be.
        share: The part of the index that this call makes; None makes all of it.
        workers: This process, or a cluster's workers.
        progress: Whether progress is shown.
        planned: Whether the work is planned first: the plan is printed, and too little memory or disk is
            refused before anything is written. Settings with something left to choose are always planned.
    """
    share = Share.parsed(share) if isinstance(share, str) else share
    folder = as_folder(out)
    refuse_input_folder(folder, inputs(data=corpus.name, model=model.source, second_moment=settings.second_moment))
    refuse_foreign_folder(folder)
    corpus = corpus.for_tokenizer(model.tokenizer, pack=settings.pack)
    records = corpus.survey(progress=progress).records  # the first pass, which checks every record
    total = records if share is None and settings.pack is None else None
    bar = Progress("Indexing", unit="examples", total=total, shown=progress)
    if planned or not isinstance(settings, ChosenSettings):
        settings = _planned(model, corpus, folder, settings, share, bar, remote=workers is not THIS_PROCESS)
    chosen = settings

    def prepared() -> IndexJob:
        return prepare(folder, corpus, model, chosen, workers=workers, bar=bar, progress=progress)

    if share is not None:
        index_share(folder, prepared, share, bar)
        return Index.open(folder, allow_incomplete=True)
    job = prepared()
    with IndexWriter.open(folder, job.manifest, on_note=bar.note) as writer:
        check_resumed(writer, model)
        completion = writer.manifest.completion
        if completion is not None:
            bar.note(f"{out}: the index is complete, with {completion.rows} examples")
        else:
            job.begin(writer, bar)
            with bar:  # after what has bars of its own, so that rate and time left are those of the shards
                bar.resume(writer.resume_point.record)
                job.fill(writer, bar)
    return Index.open(folder)


def _planned(
    model: LanguageModel,
    corpus: Corpus,
    folder: Place,
    settings: IndexSettings,
    share: Share | None,
    bar: Progress,
    *,
    remote: bool,
) -> ChosenSettings:
    """Print the plan, refuse what does not fit, and return the settings with what was left to choose."""
    plan = plan_corpus(model, corpus, folder, settings, share=share)
    if not plan.begun.complete:
        for line in plan.lines():
            bar.note(line)
        if remote:
            bar.note("  time is that of one process; the cluster's workers share the gradients")
        plan.check()
    return plan.settings
