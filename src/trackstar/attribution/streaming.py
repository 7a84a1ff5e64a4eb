"""Answers without an index: the corpus streams through the model once, against all queries at the
same time.

R_train comes from a sample of the corpus. Of the candidates only those among the first k of some
query are kept. They and the position in the corpus are saved beside the results about once a
minute, so that an interrupted run resumes.
"""

import contextlib
import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from trackstar.attribution.answering import checked_queries, facts_among, query_notes, with_kinds
from trackstar.attribution.question import Provenance, QuestionEntry, StreamEntry
from trackstar.attribution.results import QueryReport, QueryResult, Ranked
from trackstar.attribution.stream_plan import StreamPlan, plan_stream
from trackstar.attribution.verdicts import verdicts
from trackstar.attribution.writing import check_queries_as_json
from trackstar.choices import DeviceMap, Dtype, DuplicateIds, Join, Output, RecordFormat, SecondMomentKind, TrainOn
from trackstar.corpus import (
    Corpus,
    Query,
    TokenizedExample,
    open_corpus,
    query_with_texts,
    tokenize_examples,
    tokenize_query,
)
from trackstar.corpus.digests import digest_of_fields
from trackstar.curvature.autocorrelation import Autocorrelation
from trackstar.curvature.task import TaskCorrection, choose_mixing, mixed_correction
from trackstar.curvature.train_autocorrelation import FewExamples, SquareAutocorrelation, TrainAutocorrelation
from trackstar.errors import CorpusError, check_at_least, check_damping, check_mixing
from trackstar.gradients.projector import GradientProjector, projected
from trackstar.gradients.second_moment import SecondMoment
from trackstar.indexing.groups import CorpusPosition, tokenized_windows
from trackstar.indexing.provenance import make_manifest, windows_entry
from trackstar.indexing.second_moment import second_moment_for
from trackstar.indexing.settings import STREAM_WHITENING_EXAMPLES, ChosenSettings, IndexSettings
from trackstar.model.devices import float64_device
from trackstar.model.language_model import LanguageModel, load_model
from trackstar.progress import Progress
from trackstar.retrieval.reranking import influences
from trackstar.retrieval.scoring import unit_queries
from trackstar.retrieval.top_candidates import RunningTop, TopCandidates
from trackstar.store import WindowsEntry, stores_autocorrelation, tensors_digest
from trackstar.store.files.outputs import Input, check_replaceable, inputs, refuse_inputs, replace_text
from trackstar.workers.setups import GradientSetup

_EXAMPLES_AT_ONCE = 256
_SAVE_EVERY = 60.0
PARTIAL_FIELDS = {"question", "rows", "position", "best", "worst", "texts"}

_DEFAULT = IndexSettings()


def stream_queries(
    model: LanguageModel | str | Path,
    data: object,
    queries: Sequence[Query],
    *,
    k: int = 10,
    mixing: float | None = None,
    damping: float | None = None,
    task: Sequence[Query] | None = None,
    text_field: str = "text",
    id_field: str | None = None,
    limit: int | None = None,
    duplicate_ids: DuplicateIds = "refuse",
    format: RecordFormat | None = None,
    train_on: TrainOn | None = None,
    join: Join = "auto",
    chat_template: str | Path | None = None,
    window_tokens: int | None = _DEFAULT.window_tokens,
    overlap: int = _DEFAULT.overlap,
    truncate: bool = _DEFAULT.truncate,
    pack: int | None = _DEFAULT.pack,
    second_moment: str | Path | SecondMoment = _DEFAULT.second_moment,
    second_moment_kind: SecondMomentKind = _DEFAULT.second_moment_kind,
    second_moment_examples: int = _DEFAULT.second_moment_examples,
    whitening_examples: int = STREAM_WHITENING_EXAMPLES,
    side: int | None = _DEFAULT.side,
    seed: int = _DEFAULT.seed,
    output: Output = _DEFAULT.output,
    dtype: Dtype = "float32",
    device: str = "auto",
    device_map: DeviceMap | Mapping[str, str] | None = None,
    batch_tokens: int = _DEFAULT.batch_tokens,
    kept: str | Path | None = None,
    on_plan: Callable[[StreamPlan], None] | None = None,
    progress: bool = True,
) -> QueryReport:
    """Rank a corpus's examples by their influence on each query, exactly and without an index (Eq.
    1-3).

    Args:
        model: A loaded model, or the folder, hub name or `.gguf` file to load one from.
        data: The corpus; see `open_corpus`.
        queries: The prompts and completions to attribute.
        k: Number of proponents and of opponents per query.
        mixing: See `answer_queries`.
        damping: See `answer_queries`.
        task: See `answer_queries`.
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
        window_tokens: See `IndexSettings`.
        overlap: See `IndexSettings`.
        truncate: See `IndexSettings`.
        pack: See `IndexSettings`.
        second_moment: See `IndexSettings`.
        second_moment_kind: See `IndexSettings`.
        second_moment_examples: See `IndexSettings`.
        whitening_examples: Records that R_train is computed from, drawn with `seed`; their
            gradients are computed twice.
        side: See `IndexSettings`.
        seed: See `IndexSettings`.
        output: See `IndexSettings`.
        dtype: Number format of the gradient computation, `float32` or `bfloat16`.
        device: Device that computes gradients, if the model is not loaded yet; see `load_model`.
        device_map: Spreads the model over several GPUs; see `load_model`.
        batch_tokens: See `IndexSettings`.
        kept: File for partial results, from which the same call resumes. It is left in place at the
            end, for the caller to remove once the results are safe. An existing file must hold
            partial results. None saves nothing.
        on_plan: Callback that receives the plan of the work before it begins; an exception that it raises
            ends the call. None prints the plan, and refuses what does not fit into memory.
        progress: Whether progress is shown.

    Raises:
        TrackstarError: Something cannot be read, used or written; see `trackstar.errors`.
    """
    queries = _checked(queries, k, mixing, damping)
    settings = IndexSettings(
        window_tokens=window_tokens, overlap=overlap, truncate=truncate, pack=pack, second_moment=second_moment,
        second_moment_kind=second_moment_kind, second_moment_examples=second_moment_examples,
        whitening_examples=whitening_examples, side=side, seed=seed, output=output, batch_tokens=batch_tokens,
        codec="float32", shard_examples=1,
    )  # fmt: skip
    _check_kept(kept, inputs(data=data, model=model, second_moment=second_moment))
    if not isinstance(model, LanguageModel):
        model = load_model(model, dtype=dtype, device=device, device_map=device_map)
    corpus = open_corpus(
        data, text_field=text_field, id_field=id_field, limit=limit, duplicate_ids=duplicate_ids, format=format,
        train_on=train_on, join=join, chat_template=chat_template, metadata="none",
    ).for_tokenizer(model.tokenizer, pack=pack)  # fmt: skip
    corpus.survey(progress=progress)  # the first pass, which checks every record
    plan = plan_stream(model, corpus, settings, queries=len(queries) + len(task or ()))
    (on_plan or _print_plan)(plan)
    judged = verdicts(model, queries, batch_tokens=batch_tokens, progress=progress)
    queries = [query_with_texts(query, model.tokenizer) for query in queries]
    question = QuestionEntry.of(task, top=k, mixing=mixing, damping=damping, batch_tokens=batch_tokens)
    stream = _prepared(model, corpus, queries, task, plan.settings, question, progress=progress)
    ranking = _pass_over(corpus, model, stream, k, kept, progress=progress)
    return with_kinds(_report(stream, model, corpus, queries, ranking, plan.settings, question), judged, question)


def _checked(queries: object, k: int, mixing: float | None, damping: float | None) -> list[Query]:
    found = checked_queries(queries)
    check_at_least("k", k)
    check_mixing(mixing)
    check_damping(damping)
    check_queries_as_json(found)
    return found


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Stream:
    """What the pass over a corpus is computed with.

    Attributes:
        setup: How φ is computed.
        correction: The correction for the task.
        vectors: The queries' vectors.
        losses: Losses of the queries' completions, in nats.
        r_train_examples: Number of examples that R_train is the mean of.
        r_train_digest: `tensors_digest` of R_train.
    """

    setup: GradientSetup
    correction: TaskCorrection
    vectors: Float[Tensor, "queries dimensions"]
    losses: tuple[float, ...]
    r_train_examples: int
    r_train_digest: str

    def digest(self, k: int) -> str:
        """Digest of the question; a run resumes from the partial results of the same question only."""
        manifest = self.setup.manifest
        source = f"{manifest.corpora[0].digest} {manifest.model.digest} {k}"
        windows = manifest.windows
        if windows.truncate or windows.pack is not None:
            source += f" {windows.truncate} {windows.pack}"
        return digest_of_fields(self.vectors.contiguous().numpy().tobytes(), source.encode())


def _prepared(
    model: LanguageModel,
    corpus: Corpus,
    queries: Sequence[Query],
    task: Sequence[Query] | None,
    settings: ChosenSettings,
    question: QuestionEntry,
    *,
    progress: bool,
) -> _Stream:
    """Compute V, R_train, the queries' gradients and the correction for the task."""
    windows = windows_entry(model, settings)
    bar = Progress("R_train", unit="examples", shown=progress)
    for line in corpus.survey().notes(corpus.name):
        bar.note(line)
    moment = second_moment_for(settings, model, corpus, windows, out=None, note=bar.note, progress=progress)
    manifest = make_manifest(model, corpus, moment, settings)
    setup = GradientSetup(manifest=manifest, second_moment=moment, batch_tokens=settings.batch_tokens)
    with bar, setup.opened(model, bar.note) as projector:
        r_train = _autocorrelation(projector, model, corpus, windows, settings, bar)
        phi, losses = projected(projector, _tokenized(queries, model))
        if task is None:
            task_phi = phi[facts_among(queries)]
        else:
            task_phi, _ = projected(projector, _tokenized(task, model))
    mixing = choose_mixing(task_phi, r_train.spectrum, blocks=len(model.blocks), given=question.mixing)
    correction = mixed_correction(
        r_train, task_phi, mixing,
        damping=question.damping, names=[block.name for block in model.blocks], source="",
    )  # fmt: skip
    return _Stream(
        setup=setup,
        correction=correction,
        vectors=unit_queries(phi, correction.whitening),
        losses=tuple(losses.tolist()),
        r_train_examples=r_train.examples,
        r_train_digest=tensors_digest(r_train.tensors()),
    )


def _print_plan(plan: StreamPlan) -> None:
    """Print a plan in notes, and refuse what does not fit into memory."""
    bar = Progress("Planning", unit="examples", shown=False)
    for line in plan.lines():
        bar.note(line)
    plan.check()


def _tokenized(queries: Sequence[Query], model: LanguageModel) -> list[TokenizedExample]:
    return [tokenize_query(query, model.tokenizer, window_tokens=model.context_tokens) for query in queries]


def _autocorrelation(
    projector: GradientProjector,
    model: LanguageModel,
    corpus: Corpus,
    windows: WindowsEntry,
    settings: ChosenSettings,
    bar: Progress,
) -> TrainAutocorrelation:
    """R_train of a sample of the corpus.

    Raises:
        CorpusError: No record of the sample has a token to score.
    """
    drawn = corpus.sample(settings.whitening_examples, settings.seed)
    sample = tokenize_examples(
        drawn, model.tokenizer, window_tokens=windows.tokens, overlap=windows.overlap, truncate=windows.truncate
    )
    examples = itertools.chain.from_iterable(sample)
    blocks, sums = len(model.blocks), None
    few: list[Tensor] = []
    while part := list(itertools.islice(examples, _EXAMPLES_AT_ONCE)):
        few.append(projected(projector, part, bar.advance)[0])
        if sums is None and stores_autocorrelation(sum(map(len, few)), settings.side):
            sums = Autocorrelation(blocks, settings.side**2, device=float64_device(model.device))
        if sums is not None:
            for phi in few:
                sums.add(phi)
            few = []
    if sums is None and not few:
        raise CorpusError(
            f"{corpus.name}: no record of it has a token to score; expected texts of two tokens or more, "
            "with targets among them"
        )
    if sums is None:
        return FewExamples(phi=torch.cat(few), blocks=blocks)
    return SquareAutocorrelation(matrices=sums.final_mean().cpu(), examples=sums.examples)


def _pass_over(
    corpus: Corpus, model: LanguageModel, stream: _Stream, k: int, kept: str | Path | None, *, progress: bool
) -> "_PartialRanking":
    """The ranking of all candidates: what an earlier run has kept, and the influences of all others."""
    ranking = _PartialRanking(k, None if kept is None else Path(kept), stream.digest(k))
    with (
        Progress("Streaming", unit="examples", shown=progress) as bar,
        stream.setup.opened(model, bar.note) as projector,
    ):
        if ranking.rows:
            bar.note(f"{kept}: {ranking.rows:,} examples are done; the plan is that of the whole corpus")
        bar.resume(ranking.rows)
        for part, position in _parts(corpus, model, ranking.position, stream.setup.manifest.windows):
            phi, _ = projected(projector, part, bar.advance)
            ranking.add(influences(stream.correction, stream.vectors, phi), part, position)
        ranking.save()
    return ranking


def _parts(
    corpus: Corpus, model: LanguageModel, start: CorpusPosition, windows: WindowsEntry
) -> Iterator[tuple[list[TokenizedExample], CorpusPosition]]:
    """Some hundred windows at a time, with the position after them."""
    part: list[TokenizedExample] = []
    position = start
    for window, position in tokenized_windows(corpus, model, start, windows):
        if window is not None:
            part.append(window)
        if len(part) == _EXAMPLES_AT_ONCE:
            yield part, position
            part = []
    if part:
        yield part, position


def _report(
    stream: _Stream,
    model: LanguageModel,
    corpus: Corpus,
    queries: Sequence[Query],
    ranking: "_PartialRanking",
    settings: ChosenSettings,
    question: QuestionEntry,
) -> QueryReport:
    """The report on queries to a streamed corpus."""
    results = tuple(
        QueryResult(query=query, loss=stream.losses[number], proponents=proponents, opponents=opponents)
        for number, query in enumerate(queries)
        for proponents, opponents in [ranking.ranked(number)]
    )
    entry = StreamEntry(
        second_moment=_requested_moment(settings.second_moment),
        second_moment_examples=settings.second_moment_examples,
        whitening_examples=settings.whitening_examples,
        r_train_examples=stream.r_train_examples,
        r_train=stream.r_train_digest,
    )
    moment = stream.setup.second_moment
    return QueryReport(
        results=results,
        mixing=stream.correction.mixing,
        damping=stream.correction.damping,
        damping_rule=stream.correction.damping_rule,
        candidates=ranking.rows,
        codec="none",
        reranked=ranking.rows,
        recomputed=ranking.rows,
        index=corpus.name,
        model=model.source,
        coverage=str(model.coverage),
        second_moment=f"{moment.kind}, {moment.source}",
        provenance=Provenance(
            question=question,
            made_with=stream.setup.manifest,
            index=None,
            stream=entry,
            device=model.device_names,
        ),
        notes=query_notes(queries, model),
    )


def _requested_moment(second_moment: str | Path | SecondMoment) -> Literal["auto", "estimate", "none", "given"]:
    """How V was requested, for an audit."""
    match second_moment:
        case "auto" | "estimate" | "none":
            return second_moment
        case _:
            return "given"


@final
class _PartialRanking:
    """The first k and last k so far, their texts, and the position in the corpus; saved about once
    a minute.

    Args:
        k: Candidates per query at each end.
        file: The file; None saves nothing.
        digest: Digest of the question. A file with another digest is not read.
    """

    def __init__(self, k: int, file: Path | None, digest: str) -> None:
        self._file = file
        self._digest = digest
        self._running = RunningTop(k)
        self._texts: dict[int, tuple[str, str, str]] = {}
        self._saved = time.monotonic()
        self.rows = 0
        self.position = CorpusPosition(record=0, window=0, skipped=0)
        if file is not None and file.exists():
            # A file that is incomplete, or of another question, is ignored.
            with contextlib.suppress(ValueError, LookupError, TypeError, OSError):
                self._load(k, json.loads(file.read_text(encoding="utf-8")))

    def add(
        self, scores: Float[Tensor, "queries rows"], examples: Sequence[TokenizedExample], position: CorpusPosition
    ) -> None:
        """Add the next candidates."""
        rows = torch.arange(self.rows, self.rows + len(examples))
        self._running.add(scores, rows)
        for row, example in zip(rows.tolist(), examples, strict=True):
            self._texts[row] = (example.example_id, example.parent_id, example.text)
        top = self._running.top
        ranked = {row for ends in (top.proponents, top.opponents) for row in ends.flatten().tolist()}
        self._texts = {row: self._texts[row] for row in self._texts if row in ranked}
        self.rows += len(examples)
        self.position = position
        if time.monotonic() - self._saved > _SAVE_EVERY:
            self.save()

    def ranked(self, query: int) -> tuple[tuple[Ranked, ...], tuple[Ranked, ...]]:
        """A query's proponents and opponents."""
        top = self._running.top
        return (
            self._ranked(top.proponents[query], top.proponent_scores[query]),
            self._ranked(top.opponents[query], top.opponent_scores[query]),
        )

    def _ranked(self, rows: Tensor, scores: Tensor) -> tuple[Ranked, ...]:
        ranked = []
        for row, score in zip(rows.tolist(), scores.tolist(), strict=True):
            name, parent, text = self._texts[row]
            ranked.append(Ranked(row=row, example_id=name, parent_id=parent, influence=score, text=text))
        return tuple(ranked)

    def save(self) -> None:
        """Write the file, if there is one."""
        if self._file is None:
            return
        top = self._running.top
        content = {
            "question": self._digest,
            "rows": self.rows,
            "position": dataclasses.asdict(self.position),
            "best": [top.proponent_scores.tolist(), top.proponents.tolist()],
            "worst": [(-top.opponent_scores).tolist(), top.opponents.tolist()],
            "texts": {str(row): text for row, text in self._texts.items()},
        }
        assert content.keys() == PARTIAL_FIELDS
        replace_text(self._file, json.dumps(content, allow_nan=False))
        self._saved = time.monotonic()

    def _load(self, k: int, saved: Any) -> None:
        """Read saved JSON, which may be anything; an error leaves this ranking as it is."""
        if saved["question"] != self._digest:
            return
        top = TopCandidates(
            proponents=torch.tensor(saved["best"][1]),
            proponent_scores=torch.tensor(saved["best"][0]),
            opponents=torch.tensor(saved["worst"][1]),
            opponent_scores=-torch.tensor(saved["worst"][0]),
        )
        texts = {int(row): (text[0], text[1], text[2]) for row, text in saved["texts"].items()}
        position, rows = CorpusPosition(**saved["position"]), int(saved["rows"])
        self._running, self._texts, self.position, self.rows = RunningTop(k, top), texts, position, rows


def _check_kept(kept: str | Path | None, read: Sequence[Input]) -> None:
    """Raise if partial results would replace another file.

    Raises:
        OptionError: The file is something that the run reads, or holds something else.
    """
    if kept is not None:
        refuse_inputs([kept], read)
        check_replaceable(Path(kept), _is_partial_ranking)


def _is_partial_ranking(file: Path) -> bool:
    """Whether a file holds partial results, of this question or another one."""
    found = json.loads(file.read_text(encoding="utf-8"))
    return isinstance(found, dict) and found.keys() == PARTIAL_FIELDS
