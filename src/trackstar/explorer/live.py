"""Live questions to an index: what the model says, who moved it, over which tokens, and by how much when measured.

Everything that computes runs as a job on one thread (`jobs.py`); what was answered is held, so that asking on costs
little.
"""

import dataclasses
import hashlib
import json
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
from trackstar.corpus import Corpus, Query, query_text
from trackstar.errors import CorpusError, OptionError, TrackstarError
from trackstar.explorer.insight import groups, insight, scatter_rows
from trackstar.explorer.metadata import Metadata, metadata_fields
from trackstar.explorer.passages import make_passage
from trackstar.explorer.result_files import mixing_summary, sendable
from trackstar.explorer.schemas import (
    Answer,
    AnswerRequest,
    Details,
    Effect,
    GeneratedToken,
    GenerateRequest,
    Generation,
    Groups,
    IndexSummary,
    Insight,
    Passage,
    Ranking,
    Share,
    TokenSplit,
)
from trackstar.model.generation import generate_tokens
from trackstar.progress import Progress
from trackstar.store import place_name

TRACKSTAR, BM25, EMBEDDINGS = "TrackStar", "BM25", "embeddings"
_SCORE_NAMES = {
    TRACKSTAR: "influence (Eq. 1), from -1 to 1",
    BM25: "BM25 of prompt and completion",
    EMBEDDINGS: "dot product of embeddings",
}
_MOST_ANSWERS = 32


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Held:
    """An answer with all candidates' scores by method, and what has been found out about some of them."""

    answer: Answer
    attribution: Attribution
    scores: Mapping[str, Float[np.ndarray, "candidates"]]
    splits: dict[tuple[int, bool], TokenSplit] = dataclasses.field(default_factory=dict)
    effects: dict[int, Effect] = dataclasses.field(default_factory=dict)


class LiveIndex:
    """An index that can be asked.

    Args:
        attributor: The index with its model.
        encoder: An embedding model, or None.
        corpora: The corpora that were indexed, where they can be read.
        task_queries: Of how many queries the task is.
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
        self._metadata_wanted = bool(metadata_fields(self._corpora))
        self._pool: Pool | None = None
        self._bm25: BM25Retriever | None = None
        self._embeddings: EmbeddingRetriever | None = None
        self._answers: OrderedDict[str, _Held] = OrderedDict()
        self._lock = threading.Lock()
        self._task_queries = task_queries
        self._notes: list[str] = []
        try:
            self._step, self._no_step = attributor.training_step().description, None
        except TrackstarError as error:
            self._step, self._no_step = None, str(error)

    @property
    def methods(self) -> list[str]:
        """What candidates can be ranked by."""
        return [TRACKSTAR, BM25, *([EMBEDDINGS] if self._encoder is not None else [])]

    def summary(self) -> IndexSummary:
        """The index, for the browser; folders above what is named are left out."""
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
            metadata=metadata_fields(self._corpora) if self._metadata_wanted else [],
        )

    def generate(self, request: GenerateRequest) -> Generation:
        """What the model says after a prompt, token by token."""
        said = generate_tokens(self._model, request.prompt, max_new_tokens=request.max_new_tokens)
        if not said.text:
            raise OptionError("the model says nothing after the prompt; write a completion, or another prompt")
        return Generation(
            prompt=sendable(request.prompt),
            text=said.text,
            tokens=[
                GeneratedToken(start=token.start, stop=token.stop, probability=token.probability)
                for token in said.tokens
            ],
        )

    def key(self, request: AnswerRequest) -> str:
        """Names the answer to a request."""
        said = [request.prompt, request.completion, request.methods, request.top, self._index.manifest.to_json()]
        return hashlib.blake2b(json.dumps(said).encode(), digest_size=16).hexdigest()

    def check(self, request: AnswerRequest) -> None:
        """See that a request can be answered, before it is queued.

        Raises:
            OptionError: It names a method that is not there, or one twice.
        """
        unknown = [method for method in request.methods if method not in self.methods]
        if unknown or len(set(request.methods)) != len(request.methods):
            raise OptionError(
                f"methods: found {', '.join(request.methods)}; expected some of {', '.join(self.methods)}, each once"
            )

    def answer(self, request: AnswerRequest) -> Answer:
        """Attribute a completion by every method asked for; kept under its key."""
        self.check(request)
        key = self.key(request)
        if (held := self._held(key)) is not None:
            return held.answer
        query = Query(query_id="query", prompt=request.prompt, completion=request.completion)
        self._read_metadata()
        # TrackStar's influences are needed whatever is shown: tokens, measured effects and the overview are of them.
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
            loss=attribution.loss,
            probability=math.exp(-attribution.loss),
            top=request.top,
            rankings=[self._ranking(method, scores[method], request.top) for method in request.methods],
            mixing=mixing_summary(
                dataclasses.asdict(correction.mixing),
                damping=correction.damping,
                damping_rule=correction.damping_rule,
            ),
            notes=[sendable(note) for note in (*self._notes, *_cut(query, attribution), *self._exact(attribution))],
        )
        with self._lock:
            self._answers[key] = _Held(answer=answer, attribution=attribution, scores=scores)
            while len(self._answers) > _MOST_ANSWERS:
                self._answers.popitem(last=False)
        return answer

    def _exact(self, attribution: Attribution) -> list[str]:
        """Which of the influences are exact, and what may be missing, where the store has few bits."""
        if not len(attribution.reranked):
            return []
        note = (
            f"{len(attribution.reranked):,} of {self._index.rows:,} influences are from gradients computed for this "
            f"answer; the others are what is to be expected of their {self._index.manifest.codec} codes"
        )
        if attribution.missed is not None:
            note += f"; estimated chance that one of the true first ten is among these: {attribution.missed:.2g}"
        return [note]

    def known_answer(self, key: str) -> Answer | None:
        """The answer of that key, where it is still held."""
        held = self._held(key)
        return None if held is None else held.answer

    def tokens(self, key: str, row: int, *, over_query: bool) -> TokenSplit:
        """A candidate's influence split over its own tokens or the query's.

        Raises:
            OptionError: There is no such answer or row.
        """
        held = self._expected(key)
        if (row, over_query) in held.splits:
            return held.splits[row, over_query]
        split = self._attributor.over_query if over_query else self._attributor.over_candidate
        found = split(held.attribution, row)
        held.splits[row, over_query] = TokenSplit(
            row=row,
            over="query" if over_query else "candidate",
            text=sendable(found.text),
            influence=found.influence,
            total=float(found.parts.double().sum()),
            shares=_shares(found),
        )
        return held.splits[row, over_query]

    def measure(self, key: str, row: int) -> Effect:
        """Tail-patch of one candidate.

        Raises:
            OptionError: There is no such answer or row.
            TrackstarError: No training step can be made.
        """
        held = self._expected(key)
        if row not in held.effects:
            with Progress("One training step", unit="steps", shown=False):
                before, after = self._attributor.measure(held.attribution, row)
            step = self._attributor.training_step().description
            held.effects[row] = Effect(row=row, before=before, after=after, step=step)
        return held.effects[row]

    def details(self, key: str) -> Details:
        """All splits and effects of an answer so far.

        Raises:
            OptionError: There is no such answer.
        """
        held = self._expected(key)
        return Details(splits=list(held.splits.values()), effects=list(held.effects.values()))

    def insight(self, key: str) -> Insight:
        """All candidates at a glance.

        Raises:
            OptionError: There is no such answer.
        """
        held = self._expected(key)
        shown = {
            passage.row
            for ranking in held.answer.rankings
            for passage in (*ranking.proponents, *ranking.opponents)
            if passage.row is not None
        }
        influences, overlaps = held.scores[TRACKSTAR], held.scores.get(BM25)
        rows = scatter_rows(len(influences), shown) if overlaps is not None else []
        return insight(influences, overlaps, shown, {row: sendable(self.text(row)) for row in rows})

    def groups(self, key: str, *, field: str, method: str, top: int) -> Groups:
        """A method's top candidates by a field of the corpus.

        Raises:
            OptionError: There is no such answer, field or method in it.
        """
        held = self._expected(key)
        metadata = self._metadata
        if metadata is None or field not in metadata.fields:
            found = ", ".join(metadata.fields) if metadata is not None else "none"
            raise OptionError(f"field {field}: the corpus has {found or 'none'}; choose one of them")
        if method not in held.scores:
            raise OptionError(f"method {method}: expected one of {', '.join(held.scores)}")
        scores = torch.from_numpy(held.scores[method])
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
            OptionError: There is no such row.
        """
        if not 0 <= row < self._index.rows:
            raise OptionError(f"row {row}: expected a candidate of the index, 0 to {self._index.rows - 1}")
        return self._index.example(row).example.text

    def _ranking(self, method: str, scores: Float[np.ndarray, "candidates"], top: int) -> Ranking:
        values = torch.from_numpy(scores)
        best = values.sort(descending=True, stable=True).indices[:top].tolist()
        worst = values.sort(stable=True).indices[:top].tolist() if method == TRACKSTAR else []
        return Ranking(
            method=method,
            score=_SCORE_NAMES[method],
            # A candidate of the wrong sign is neither a proponent nor an opponent, whatever its rank.
            proponents=self._passages([row for row in best if scores[row] > 0], scores),
            opponents=self._passages([row for row in worst if scores[row] < 0], scores),
        )

    def _passages(self, rows: Sequence[int], scores: Float[np.ndarray, "candidates"]) -> list[Passage]:
        passages = []
        for rank, stored in enumerate(self._index.some_examples(rows), start=1):
            row, example = stored.row, stored.example
            passages.append(
                make_passage(
                    rank=rank,
                    row=row,
                    example_id=example.example_id,
                    parent_id=example.parent_id,
                    score=float(scores[row]),
                    text=example.text,
                    metadata=self._metadata.of_record(example.record) if self._metadata is not None else None,
                )
            )
        return passages

    def _retriever(self, method: str) -> BM25Retriever | EmbeddingRetriever:
        if self._pool is None:
            with Progress("Reading texts", unit="examples", total=self._index.rows, shown=False) as bar:
                names, texts = [], []
                for stored in self._index.examples():
                    # A corpus may name two examples alike; a row never is.
                    names.append(str(stored.row))
                    texts.append(stored.example.text)
                    bar.advance(1)
                self._pool = Pool(example_ids=tuple(names), texts=tuple(texts))
        if method == BM25:
            if self._bm25 is None:
                with Progress("Indexing words", unit="examples", shown=False):
                    self._bm25 = BM25Retriever(self._pool, progress=False)
            return self._bm25
        if self._embeddings is None:
            assert self._encoder is not None, "checked before"
            self._embeddings = EmbeddingRetriever(self._pool, self._encoder, progress=False)
        return self._embeddings

    def _read_metadata(self) -> None:
        if self._metadata is None and self._metadata_wanted:
            try:
                self._metadata = Metadata.read(self._index, self._corpora)
            except CorpusError as error:
                # Without its fields an answer is still an answer.
                self._metadata_wanted = False
                self._notes.append(f"no fields of the corpus's records are shown: {error}")

    def _held(self, key: str) -> _Held | None:
        with self._lock:
            held = self._answers.get(key)
            if held is not None:
                self._answers.move_to_end(key)
            return held

    def _expected(self, key: str) -> _Held:
        held = self._held(key)
        if held is None:
            raise OptionError("the answer is not held any more; attribute again")
        return held


def _cut(query: Query, attribution: Attribution) -> list[str]:
    """A note where the model's window held but the end of prompt and completion."""
    whole, read = len(query_text(query)), len(attribution.example.text)
    if read == whole:
        return []
    return [f"the model's window holds the last {read:,} of {whole:,} characters: what stands before was not read"]


def _shares(found: TokenInfluence) -> list[Share]:
    return [
        Share(start=span.start, stop=span.stop, influence=float(part))
        for span, part in zip(found.spans, found.parts, strict=True)
    ]
