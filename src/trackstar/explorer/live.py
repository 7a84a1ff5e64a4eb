"""Live questions to an index: the model's answer, its proponents, token splits, and measured
effects.

Computations run as jobs on one thread (`jobs.py`). Answers stay in memory, so that further
questions about an answer cost little.
"""

import dataclasses
import math
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import PurePath

import numpy as np
import torch
from jaxtyping import Float

from trackstar.attribution.attributor import Attribution, Attributor, TokenInfluence
from trackstar.baselines.bm25 import BM25Retriever
from trackstar.baselines.embeddings import EmbeddingRetriever, Encoder
from trackstar.baselines.interface import Pool
from trackstar.corpus import Corpus, Query, query_text, separator
from trackstar.corpus.digests import digest_of_json
from trackstar.errors import CorpusError, OptionError, TrackstarError
from trackstar.explorer.candidates import make_candidate
from trackstar.explorer.insight import groups, insight, scatter_rows
from trackstar.explorer.messages import sendable, without_backticks
from trackstar.explorer.metadata import Metadata, metadata_fields
from trackstar.explorer.question_schemas import (
    Answer,
    AnswerRequest,
    Details,
    Effect,
    GeneratedToken,
    GenerateRequest,
    Generation,
    Groups,
    Insight,
    Ranking,
    Share,
    TokenSplit,
)
from trackstar.explorer.refusals import MissingError
from trackstar.explorer.result_files import mixing_summary
from trackstar.explorer.schemas import Candidate, IndexSummary
from trackstar.model.generation import generate
from trackstar.model.generation_settings import GenerationSettings
from trackstar.progress import Progress
from trackstar.store import place_name

TRACKSTAR, BM25, EMBEDDINGS = "TrackStar", "BM25", "embeddings"
_SCORE_NAMES = {
    TRACKSTAR: "influence, from -1 to 1",
    BM25: "BM25 score: words shared with prompt and completion",
    EMBEDDINGS: "dot product of sentence embeddings",
}
_MOST_ANSWERS = 32
ANSWER_GONE = "the answer is no longer in memory; attribute the completion again"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _CachedAnswer:
    """An answer with all candidates' scores by method, and its token splits and measured effects so far."""

    answer: Answer
    attribution: Attribution
    scores: Mapping[str, Float[np.ndarray, "candidates"]]
    splits: dict[tuple[int, bool], TokenSplit] = dataclasses.field(default_factory=dict)
    effects: dict[int, Effect] = dataclasses.field(default_factory=dict)


class LiveIndex:
    """An index that answers questions.

    Args:
        attributor: The index with its model.
        encoder: An embedding model, or None.
        corpora: The corpora that were indexed; empty if they cannot be read.
        task_queries: Number of queries in the task.
    """

    def __init__(
        self, attributor: Attributor, *, encoder: Encoder | None, corpora: Sequence[Corpus], task_queries: int
    ) -> None:
        self._attributor = attributor
        self._index = attributor.index
        self._model = attributor.model
        self._encoder = encoder
        self._corpora = list(corpora)
        self._metadata: Metadata | None = None
        self._has_metadata = bool(metadata_fields(self._index, self._corpora))
        self._pool: Pool | None = None
        self._bm25: BM25Retriever | None = None
        self._embeddings: EmbeddingRetriever | None = None
        self._answers: OrderedDict[str, _CachedAnswer] = OrderedDict()
        self._lock = threading.Lock()
        self._task_queries = task_queries
        self._notes: list[str] = []
        try:
            self._step, self._no_step = attributor.training_step().description, None
        except TrackstarError as error:
            self._step, self._no_step = None, without_backticks(str(error))

    @property
    def methods(self) -> list[str]:
        """Methods that can rank candidates."""
        return [TRACKSTAR, BM25, *([EMBEDDINGS] if self._encoder is not None else [])]

    def summary(self) -> IndexSummary:
        """Description of the index for the browser; paths are shown without the folders above them."""
        manifest = self._index.manifest
        return IndexSummary(
            name=sendable(place_name(self._index.path)),
            candidates=self._index.rows,
            dimensions=self._index.dimensions,
            codec=manifest.codec,
            architecture=manifest.model.architecture,
            model="/".join(PurePath(manifest.model.source).parts[-2:]).lstrip("/"),
            coverage=str(self._model.coverage),
            second_moment=manifest.second_moment.kind,
            corpus=", ".join(PurePath(corpus.source).name for corpus in manifest.corpora),
            task_queries=self._task_queries,
            methods=self.methods,
            step=self._step,
            no_step=self._no_step,
            metadata=metadata_fields(self._index, self._corpora) if self._has_metadata else [],
        )

    def generate(self, request: GenerateRequest) -> Generation:
        """The model's continuation of a prompt, token by token."""
        settings = GenerationSettings(
            max_new_tokens=request.max_new_tokens, temperature=request.temperature, sampling_seed=request.seed,
            stop=request.stop, chat=request.chat,
        )  # fmt: skip
        query = Query(query_id="prompt", prompt=request.prompt, chat_template=self._index.manifest.chat_template)
        generated = generate(self._model, query, settings)
        if not generated.text.strip():
            raise OptionError("the model's answer is empty; enter a completion, or another prompt")
        return Generation(
            prompt=sendable(generated.prompt),
            text=generated.text,
            prompt_ids=list(generated.prompt_ids),
            tokens=[GeneratedToken(**dataclasses.asdict(token)) for token in generated.tokens],
        )

    def key(self, request: AnswerRequest) -> str:
        """Key of the answer to a request, from the request and the index's manifest."""
        return digest_of_json([request.model_dump(), self._index.manifest.to_json()])

    def check(self, request: AnswerRequest) -> None:
        """Raise if a request cannot be answered, before it is queued.

        Raises:
            MissingError: No embedding model is open.
        """
        if EMBEDDINGS in request.methods and self._encoder is None:
            raise MissingError("methods: no embedding model is open; restart the explorer with one, or leave it out")

    def answer(self, request: AnswerRequest) -> Answer:
        """Attribute a completion by every requested method, and keep the answer in memory."""
        self.check(request)
        key = self.key(request)
        if (cached := self._cached(key)) is not None:
            return cached.answer
        query = _query(request)
        self._read_metadata()
        # Always computed: token splits, measured effects and the overview need TrackStar's
        # influences.
        attribution = self._attributor.attribute(query)
        scores = {TRACKSTAR: attribution.influences.numpy()}
        for method in request.methods:
            if method != TRACKSTAR:
                scores[method] = self._retriever(method).scores([query])[0].numpy()
        correction = self._attributor.correction
        answer = Answer(
            key=key,
            prompt=sendable(request.prompt),
            completion=sendable(request.completion),
            separator=separator(query),
            loss=attribution.loss,
            probability=math.exp(-attribution.loss),
            top=request.top,
            rankings=[self._ranking(method, scores[method], request.top) for method in request.methods],
            mixing=mixing_summary(
                dataclasses.asdict(correction.mixing),
                damping=correction.damping,
                damping_rule=correction.damping_rule,
            ),
            notes=[
                sendable(note)
                for note in (*self._notes, *_window_notes(query, attribution), *self._reranking_notes(attribution))
            ],
        )
        with self._lock:
            self._answers[key] = _CachedAnswer(answer=answer, attribution=attribution, scores=scores)
            while len(self._answers) > _MOST_ANSWERS:
                self._answers.popitem(last=False)
        return answer

    def _reranking_notes(self, attribution: Attribution) -> list[str]:
        """A note on exact and estimated influences, if candidates were re-ranked."""
        if not len(attribution.reranked):
            return []
        exact, candidates = len(attribution.reranked), self._index.rows
        note = f"{exact:,} of {candidates:,} influences are exact, from gradients recomputed for this answer"
        if exact < candidates:
            note += f"; the others are estimated from their {self._index.manifest.codec} codes"
            if attribution.missed is not None:
                note += f"; estimated chance that one of the true top ten is among the others: {attribution.missed:.2g}"
        return [note]

    def cached_answer(self, key: str) -> Answer | None:
        """The answer with that key, if it is still in memory."""
        cached = self._cached(key)
        return None if cached is None else cached.answer

    def tokens(self, key: str, row: int, *, over_query: bool) -> TokenSplit:
        """A candidate's influence split over its own tokens or the query's.

        Raises:
            MissingError: The answer is not in memory, or the row does not exist.
        """
        cached = self._required(key)
        if (row, over_query) in cached.splits:
            return cached.splits[row, over_query]
        split = self._attributor.over_query if over_query else self._attributor.over_candidate
        influence = split(cached.attribution, row)
        cached.splits[row, over_query] = TokenSplit(
            row=row,
            over="query" if over_query else "candidate",
            text=sendable(influence.text),
            influence=influence.influence,
            total=float(influence.parts.double().sum()),
            shares=_shares(influence),
        )
        return cached.splits[row, over_query]

    def measure(self, key: str, row: int) -> Effect:
        """Measure the effect of one training step on a candidate (tail-patch; paper, §5.2).

        Raises:
            MissingError: The answer is not in memory, or the row does not exist.
            TrackstarError: No training step can be made.
        """
        cached = self._required(key)
        if row not in cached.effects:
            with Progress("Making one training step", unit="steps", shown=False):
                before, after = self._attributor.measure(cached.attribution, row)
            step = self._attributor.training_step().description
            cached.effects[row] = Effect(row=row, before=before, after=after, step=step)
        return cached.effects[row]

    def details(self, key: str) -> Details:
        """All token splits and measured effects of an answer so far.

        Raises:
            MissingError: The answer is not in memory.
        """
        cached = self._required(key)
        return Details(splits=list(cached.splits.values()), effects=list(cached.effects.values()))

    def insight(self, key: str) -> Insight:
        """The influences of all candidates of an answer.

        Raises:
            MissingError: The answer is not in memory.
        """
        cached = self._required(key)
        shown = {
            candidate.row
            for ranking in cached.answer.rankings
            for candidate in (*ranking.proponents, *ranking.opponents)
            if candidate.row is not None
        }
        influences, overlaps = cached.scores[TRACKSTAR], cached.scores.get(BM25)
        rows = scatter_rows(len(influences), shown) if overlaps is not None else []
        return insight(influences, overlaps, shown, {row: sendable(self.text(row)) for row in rows})

    def groups(self, key: str, *, field: str, method: str, top: int) -> Groups:
        """A method's top candidates, grouped by a field of the corpus.

        Raises:
            MissingError: The answer is not in memory, or lacks the field or the method.
        """
        cached = self._required(key)
        metadata = self._metadata
        if metadata is None or field not in metadata.fields:
            fields = ", ".join(metadata.fields) if metadata is not None else "none"
            raise MissingError(f"`field`: the corpus has {fields or 'none'}, found {field}; choose one of its fields")
        if method not in cached.scores:
            raise MissingError(
                f"`method`: the answer has {', '.join(cached.scores)}, found {method}; choose one of them"
            )
        scores = torch.from_numpy(cached.scores[method])
        rows = scores.sort(descending=True, stable=True).indices[:top].tolist()
        examples = [stored.example for stored in self._index.some_examples(rows)]
        values = [metadata.of_record(example.record).get(field, "") for example in examples]
        return groups(
            field,
            method,
            rows,
            [float(scores[row]) for row in rows],
            [sendable(value) for value in values],
            {sendable(value): share for value, share in metadata.shares(field).items()},
        )

    def text(self, row: int) -> str:
        """A candidate's whole text.

        Raises:
            MissingError: The row does not exist.
        """
        if not 0 <= row < self._index.rows:
            raise MissingError(f"`row`: expected a candidate of the index, 0 to {self._index.rows - 1}, found {row}")
        return self._index.example(row).example.text

    def _ranking(self, method: str, scores: Float[np.ndarray, "candidates"], top: int) -> Ranking:
        values = torch.from_numpy(scores)
        best = values.sort(descending=True, stable=True).indices[:top].tolist()
        worst = values.sort(stable=True).indices[:top].tolist() if method == TRACKSTAR else []
        return Ranking(
            method=method,
            score=_SCORE_NAMES[method],
            # Proponents have positive scores and opponents negative ones, whatever their rank.
            proponents=self._candidates([row for row in best if scores[row] > 0], scores),
            opponents=self._candidates([row for row in worst if scores[row] < 0], scores),
        )

    def _candidates(self, rows: Sequence[int], scores: Float[np.ndarray, "candidates"]) -> list[Candidate]:
        candidates = []
        for rank, stored in enumerate(self._index.some_examples(rows), start=1):
            row, example = stored.row, stored.example
            candidates.append(
                make_candidate(
                    rank=rank,
                    row=row,
                    example_id=example.example_id,
                    parent_id=example.parent_id,
                    score=float(scores[row]),
                    text=example.text,
                    metadata=self._metadata.of_record(example.record) if self._metadata is not None else None,
                )
            )
        return candidates

    def _retriever(self, method: str) -> BM25Retriever | EmbeddingRetriever:
        if self._pool is None:
            with Progress("Reading candidates", unit="candidates", total=self._index.rows, shown=False) as bar:
                names, texts = [], []
                for stored in self._index.examples():
                    # Rows, because two examples of a corpus may have the same name.
                    names.append(str(stored.row))
                    texts.append(stored.example.text)
                    bar.advance(1)
                self._pool = Pool(example_ids=tuple(names), texts=tuple(texts))
        if method == BM25:
            if self._bm25 is None:
                with Progress("Building the BM25 index", unit="candidates", shown=False):
                    self._bm25 = BM25Retriever(self._pool, progress=False)
            return self._bm25
        if self._embeddings is None:
            assert self._encoder is not None, "self.methods has embeddings only with an encoder"
            self._embeddings = EmbeddingRetriever(self._pool, self._encoder, progress=False)
        return self._embeddings

    def _read_metadata(self) -> None:
        if self._metadata is None and self._has_metadata:
            try:
                self._metadata = Metadata.read(self._index, self._corpora)
            except CorpusError as error:
                # The fields are an extra: the answer is shown without them.
                self._has_metadata = False
                self._notes.append(without_backticks(f"the corpus's fields are not shown: {error}"))

    def _cached(self, key: str) -> _CachedAnswer | None:
        with self._lock:
            cached = self._answers.get(key)
            if cached is not None:
                self._answers.move_to_end(key)
            return cached

    def _required(self, key: str) -> _CachedAnswer:
        cached = self._cached(key)
        if cached is None:
            raise MissingError(ANSWER_GONE)
        return cached


def _query(request: AnswerRequest) -> Query:
    """The query of a request.

    Raises:
        OptionError: The first token to explain is none of the tokens.
    """
    query = Query(query_id="query", prompt=request.prompt, completion=request.completion, join=request.join)
    if request.tokens is None:
        return query
    token_ids, first = request.tokens.token_ids, request.tokens.first
    if first >= len(token_ids):
        raise OptionError(f"`tokens.first`: expected one of {len(token_ids)} tokens, counted from 0, found {first}")
    mask = tuple(position >= first for position in range(len(token_ids)))
    return dataclasses.replace(query, token_ids=tuple(token_ids), target_mask=mask)


def _window_notes(query: Query, attribution: Attribution) -> list[str]:
    """A note if prompt and completion are longer than the model's window."""
    whole, read = len(query_text(query)), len(attribution.example.text)
    if read == whole:
        return []
    return [f"the model's window holds the last {read:,} of {whole:,} characters; the text before was not read"]


def _shares(split: TokenInfluence) -> list[Share]:
    return [
        Share(start=span.start, stop=span.stop, influence=float(part))
        for span, part in zip(split.spans, split.parts, strict=True)
    ]
