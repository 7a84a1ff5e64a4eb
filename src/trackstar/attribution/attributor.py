"""Attributor: an index with its model and a task's R in memory, so that a question costs one
gradient and one pass.

`answer_queries` answers a set of queries at once and keeps nothing in memory. An attributor answers
one question after another, and further questions about an answer: the influences of all candidates,
the split of a candidate's influence over tokens, and the effect of a training step on a candidate
(tail-patch).
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from trackstar.attribution.answering import gradient_setup, query_gradients
from trackstar.attribution.markup import heat_map
from trackstar.corpus import Query, TokenizedExample, query_with_texts, tokenize_query
from trackstar.corpus.token_spans import TextSpan, token_spans
from trackstar.curvature.task import TaskCorrection, check_choices, task_correction
from trackstar.errors import OptionError, check_at_least
from trackstar.gradients.projector import projected
from trackstar.gradients.token_split import ProjectionSettings, split_over_tokens
from trackstar.model.language_model import LanguageModel
from trackstar.pretraining.checkpoints import STATE_FILE
from trackstar.progress import Progress
from trackstar.retrieval.plausibility import check_rows, check_scores
from trackstar.retrieval.reranking import RERANKED, CoarseRanking, ExactScores, calibration, rerank
from trackstar.retrieval.scoring import Scorer, scores, trackstar_scorer
from trackstar.store import Index, quantized_bits
from trackstar.tail_patch import Pair, TrainingStep, tail_patch
from trackstar.workers.index_model import check_identity, second_moment_of_index
from trackstar.workers.setups import projector_of
from trackstar.workers.stored_losses import check_again, check_sample

RELATIVE_LEARNING_RATE = 0.01
"""Learning rate of the tail-patch for a model without optimizer state, relative to each matrix's
root mean square.
"""

# The miss estimate is of the first ten proponents.
_MISS_ESTIMATE_TOP = 10
# Candidates at each end whose rows are compared with their stored norms, as they are likely to be
# shown.
_SHOWN = 50


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Attribution:
    """Every candidate's influence on one query's completion.

    Attributes:
        query: The query.
        example: Its tokens.
        loss: Sum of the cross-entropies of the completion's tokens, in nats.
        scorer: The query's vector, and every candidate's multiplier.
        query_norm: ‖Wφ_q‖.
        influences: Every candidate's influence (Eq. 1). For a low-bit index, those of the
            `reranked` candidates come from recomputed gradients; the others are expected values,
            given their codes.
        reranked: Rows of the candidates whose gradients were recomputed.
        missed: Estimated chance that one of the true first ten was not re-ranked; see
            `reranking.py`.
    """

    query: Query
    example: TokenizedExample
    loss: float
    scorer: Scorer
    query_norm: float
    influences: Float[Tensor, "candidates"]
    reranked: Int64[Tensor, "rows"]
    missed: float | None

    def top(self, k: int) -> tuple[Int64[Tensor, "k"], Int64[Tensor, "k"]]:
        """Rows of the k most positive candidates, descending, and of the k most negative,
        ascending.

        Among candidates with equal influence the first in the index ranks first.
        """
        check_at_least("k", k)
        best = self.influences.sort(descending=True, stable=True).indices[:k]
        worst = self.influences.sort(stable=True).indices[:k]
        return best, worst


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenInfluence:
    """A candidate's influence, split over the tokens of a text.

    Attributes:
        text: The text.
        spans: Each token's place in the text; special tokens have empty spans.
        parts: Each token's part of the influence.
        influence: The influence as ranked. The parts sum to it, but for the store's rounding.
    """

    text: str
    spans: tuple[TextSpan, ...]
    parts: Float[Tensor, "tokens"]
    influence: float

    @property
    def pieces(self) -> list[tuple[str, float]]:
        """The text cut at its tokens, each piece with its part. Tokens that share a character share
        a piece.
        """
        pieces: list[tuple[str, float]] = []
        end = 0
        for span, part in zip(self.spans, self.parts.tolist(), strict=True):
            if span.stop <= end and span.start < span.stop and pieces:
                pieces[-1] = (pieces[-1][0], pieces[-1][1] + part)
            else:
                pieces.append((self.text[end : span.stop], part))
            end = max(end, span.stop)
        return [*pieces, (self.text[end:], 0.0)] if end < len(self.text) else pieces

    def _repr_html_(self) -> str:
        """The text as a notebook shows it, coloured by influence."""
        return f"<p>influence {self.influence:+.4f}, split over tokens</p>{heat_map(self.pieces)}"


class Attributor:
    """An index and its model, for one question after another.

    Args:
        index: The index.
        model: The model that was indexed; see `model_of_index`.
        task: The queries that R_eval and λ are computed from; none is R_train alone.
        mixing: λ; None follows the paper's rule.
        damping: See `answer_queries`.
        reranked: Candidates at each end of the store's ranking that are re-ranked by recomputed
            gradients; None is the codec's `RERANKED`.
        batch_tokens: Most tokens per batch, padding included.
    """

    def __init__(
        self,
        index: Index,
        model: LanguageModel,
        *,
        task: Sequence[Query] = (),
        mixing: float | None = None,
        damping: float | None = None,
        reranked: int | None = None,
        batch_tokens: int = 2048,
    ) -> None:
        check_choices(index, mixing=mixing, damping=damping)
        check_at_least("reranked", reranked, 0)
        check_at_least("batch_tokens", batch_tokens)
        check_identity(index, model, weights=False)
        check_sample(index, model)
        self._reranked = RERANKED[index.manifest.codec] if reranked is None else reranked
        self.index = index
        self.model = model
        self._task = list(task)
        self._mixing = mixing
        self._damping = damping
        self._batch_tokens = batch_tokens
        self._correction: TaskCorrection | None = None
        self._step: TrainingStep | None = None

    @property
    def correction(self) -> TaskCorrection:
        """R for the task, inverted. The first use computes it, which takes a while at 65,536 dimensions."""
        if self._correction is None:
            phi = torch.empty(0, self.index.dimensions)
            if self._task:
                phi, _ = query_gradients(
                    self.index, self.model, self._task, batch_tokens=self._batch_tokens, progress=False
                )
            with Progress("Whitening for the task", unit="inverses", shown=False):
                self._correction = task_correction(self.index, phi, mixing=self._mixing, damping=self._damping)
        return self._correction

    def attribute(self, query: Query) -> Attribution:
        """Every candidate's influence on a query's completion (Eq. 1-2).

        Raises:
            CorpusError: The query cannot be tokenized.
            GradientError: Its gradient is zero or not finite.
        """
        (query,) = self.index.manifest.in_template([query])
        query = query_with_texts(query, self.model.tokenizer)
        example = tokenize_query(query, self.model.tokenizer, window_tokens=self.model.context_tokens)
        correction = self.correction
        phi, losses = query_gradients(self.index, self.model, [query], batch_tokens=self._batch_tokens, progress=False)
        coordinates = correction.coordinates(phi)
        scorer = trackstar_scorer(self.index, coordinates, correction.whitening, key=correction.key)
        influences = torch.empty(self.index.rows)
        with Progress("Scan", unit="examples", total=self.index.rows, shown=False) as bar:
            for first, part in scores(self.index, scorer):
                influences[first : first + part.shape[1]] = part[0]
                bar.advance(part.shape[1])
        every = torch.arange(self.index.rows)
        check_scores(self.index, every, influences, exact=False)
        rows, missed = torch.empty(0, dtype=torch.int64), None
        if self._reranked:
            rows, influences, missed = self._reranked_influences(scorer, influences)
            check_scores(self.index, rows, influences[rows], exact=True)
        ends = influences.argsort()
        check_rows(self.index, torch.cat([ends[:_SHOWN], ends[-_SHOWN:]]).unique())
        return Attribution(
            query=query,
            example=example,
            loss=float(losses[0]),
            scorer=scorer,
            query_norm=float(correction.whitening.norms(coordinates)),
            influences=influences,
            reranked=rows,
            missed=missed,
        )

    def _reranked_influences(self, scorer: Scorer, coarse: Tensor) -> tuple[Tensor, Tensor, float | None]:
        """Rows re-ranked, every candidate's influence, and the estimated chance of a miss.

        The best and worst candidates' influences come from recomputed gradients. The others' are
        the values to be expected of their codes.
        """
        setup = gradient_setup(self.index, self._batch_tokens)
        scores = ExactScores(self.index, self.model, setup, self.correction, scorer.vectors)
        k = min(_MISS_ESTIMATE_TOP, self._reranked)
        ranking = rerank(CoarseRanking.of_scores(coarse[None], self._reranked), scores, k, reranked=self._reranked)
        rows = ranking.rows[0].unique()
        exact = ranking.scores[0][torch.searchsorted(ranking.rows[0], rows)]
        influences = calibration(coarse[rows], exact).expected(coarse)
        influences[rows] = exact
        return rows, influences, ranking.missed[0]

    def over_candidate(self, attribution: Attribution, row: int) -> TokenInfluence:
        """A candidate's influence, split over the candidate's tokens.

        Raises:
            OptionError: The index has no such row.
        """
        example = self._example(row)
        norm = float(self.correction.whitening.norms(self._coordinates(row)))
        return self._split(attribution, row, example, attribution.scorer.vectors * _inverse(norm))

    def over_query(self, attribution: Attribution, row: int) -> TokenInfluence:
        """A candidate's influence, split over the tokens of the query's prompt and completion.

        Eq. 1 is symmetric: R⁻¹φ_m/‖Wφ_m‖ of the candidate is multiplied by the query's gradient,
        position by position.

        Raises:
            OptionError: The index has no such row.
        """
        self._example(row)
        coordinates = self._coordinates(row)
        corrected = self.correction.whitening.apply_inverse(coordinates)
        factor = _inverse(float(self.correction.whitening.norms(coordinates))) / attribution.query_norm
        return self._split(attribution, row, attribution.example, corrected * factor)

    def _coordinates(self, row: int) -> Float[Tensor, "1 dimensions"]:
        """A candidate in the index's coordinates: as stored, or for a low-bit index from its
        recomputed gradient.
        """
        if quantized_bits(self.index.manifest.codec) is None:
            return self.index.some_rows([row]).decode()
        setup = gradient_setup(self.index, self._batch_tokens)
        with projector_of(
            setup.manifest, self.model, setup.second_moment, batch_tokens=setup.batch_tokens
        ) as projector:
            phi, _ = projected(projector, [self._example(row)])
        return self.correction.coordinates(phi)

    def _split(
        self, attribution: Attribution, row: int, example: TokenizedExample, vectors: Float[Tensor, "1 dimensions"]
    ) -> TokenInfluence:
        manifest = self.index.manifest
        with Progress("Split over tokens", unit="examples", total=1, shown=False) as bar:
            (parts,) = split_over_tokens(
                self.model,
                second_moment_of_index(self.index),
                [example],
                self.correction.gradient_vectors(vectors),
                ProjectionSettings(
                    seed=manifest.projection.seed,
                    side=manifest.projection.side,
                    output=manifest.output,
                    kind=manifest.projection.kind,
                ),
                batch_tokens=self._batch_tokens,
                advance=bar.advance,
            )
        return TokenInfluence(
            text=example.text,
            spans=token_spans(example, self.model.tokenizer),
            parts=parts,
            influence=float(attribution.influences[row]),
        )

    def training_step(self) -> TrainingStep:
        """The training step of the tail-patch. The first use prepares it.

        Raises:
            TrackstarError: The model has neither optimizer state nor a factored V.
        """
        if self._step is None:
            self._step = training_step(self.model, self.index)
        return self._step

    def measure(self, attribution: Attribution, row: int) -> tuple[float, float]:
        """Tail-patch: the completion's probability before and after one training step on a
        candidate (paper, §5.2).

        Raises:
            OptionError: The index has no such row.
            TrackstarError: The model has neither optimizer state nor a factored V.
        """
        result = tail_patch(
            self.model,
            self.training_step(),
            [attribution.example],
            [self._example(row)],
            [Pair(query=0, proponent=0)],
            path="exact",
            batch_tokens=self._batch_tokens,
        )
        return float(result.before[0]), float(result.after[0])

    def _example(self, row: int) -> TokenizedExample:
        if not 0 <= row < self.index.rows:
            raise OptionError(f"`row`: expected a candidate of the index, 0 to {self.index.rows - 1}, found {row}")
        stored = self.index.example(row)
        check_again(self.index, self.model, [stored])
        return stored.example


def _inverse(norm: float) -> float:
    return 1 / norm if norm > 0 else 0.0


def has_training_state(model: LanguageModel) -> bool:
    """Whether the model is a checkpoint of `pretrain`, which holds its optimizer state."""
    return model.folder is not None and (Path(model.folder) / STATE_FILE).exists()


def training_step(model: LanguageModel, index: Index, learning_rate: float | None = None) -> TrainingStep:
    """The next step of the model's own training if its optimizer state is saved, else a relative
    step with V.

    Args:
        model: The model.
        index: The index, for its V.
        learning_rate: Learning rate of the relative step; None is `RELATIVE_LEARNING_RATE`.

    Raises:
        OptionError: There is neither optimizer state nor a factored V.
    """
    if model.folder is not None and has_training_state(model):
        return TrainingStep.from_checkpoint(model.folder, model)
    moment = second_moment_of_index(index)
    # An estimated V is of summed losses, an optimizer's V of the mean losses that a run is trained
    # with.
    loss = "sum" if moment.source.startswith("estimated") else "mean"
    return TrainingStep.from_second_moment(
        moment, model, learning_rate=learning_rate or RELATIVE_LEARNING_RATE, loss=loss
    )
