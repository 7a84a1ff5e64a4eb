"""Rankings of the candidates by every method, computed if they are not in the report's folder."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from trackstar.baselines import (
    BM25Retriever,
    EmbeddingRetriever,
    GoldRetriever,
    Pool,
    RandomRetriever,
    Retriever,
    load_encoder,
)
from trackstar.baselines.gradients import (
    EXPERIMENTS,
    ONE_SIDED,
    OTHER_OUTPUTS,
    TRACKSTAR,
    GradientMethod,
    GradientRetriever,
    IndexedGradients,
)
from trackstar.baselines.trak import TRAK, TRAKRetriever
from trackstar.corpus import Corpus, Query, open_corpus
from trackstar.editing.narrowing import narrow_index
from trackstar.evaluation.config import EvaluationConfig
from trackstar.evaluation.facts import Fact, evidence, fact_digest, to_queries
from trackstar.evaluation.metrics import QueryMetrics, gold_ranks, metrics_of_ranks
from trackstar.evaluation.workspace import Workspace
from trackstar.gradients.dense_projection import check_flattened_size
from trackstar.indexing.build import index_corpus
from trackstar.indexing.settings import ChosenSettings
from trackstar.model.language_model import LanguageModel
from trackstar.model.loading import pretrained_digest
from trackstar.store import Index
from trackstar.workers.protocol import THIS_PROCESS, Workers

GRADIENT_METHODS = {method.name: method for method in (*EXPERIMENTS, TRACKSTAR, *OTHER_OUTPUTS, ONE_SIDED)}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """The part of a method's scores that is saved, per query.

    Attributes:
        ranks: Ranks of the gold candidates, ascending; candidates that are neither correct nor
            wrong are not counted. Empty for a question without gold examples.
        rows: Rows of the first k candidates in the pool, the best first; none is left out.
        scores: Scores of these k candidates.
    """

    ranks: tuple[tuple[int, ...], ...]
    rows: tuple[tuple[int, ...], ...]
    scores: tuple[tuple[float, ...], ...]

    def metrics(self, *, at: int = 10) -> QueryMetrics:
        """Reciprocal rank, recall and precision of each query that has gold examples."""
        return metrics_of_ranks([ranks for ranks in self.ranks if ranks], at=at)


class Rankings:
    """All methods on one pool of candidates.

    The candidates are the examples of TrackStar's index, so that all methods rank the same ones.

    Args:
        config: Settings of the report.
        model: The model.
        workspace: Folder that indexes and rankings are saved in.
        workers: The workers that build indexes and compute gradients.
        progress: Whether progress is shown.

    Raises:
        OptionError: The dense projections of the one-sided method do not fit in memory.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        model: LanguageModel,
        workspace: Workspace,
        *,
        workers: Workers = THIS_PROCESS,
        progress: bool = True,
    ) -> None:
        self._config = config
        self._model = model
        self._workspace = workspace
        self._workers = workers
        self._progress = progress
        self._gradients: dict[tuple[str, bool, str, int], IndexedGradients] = {}
        if ONE_SIDED.name in config.methods:
            check_flattened_size(model.matrices, min(config.side))
        stored = [example.example for example in self.index(TRACKSTAR).examples()]
        self.pool = Pool(
            example_ids=tuple(example.example_id for example in stored),
            texts=tuple(example.text for example in stored),
        )

    def index(self, method: GradientMethod, *, side: int | None = None) -> Index:
        """The index for a method."""
        return self._indexed(method, self._side(method, side)).index

    def index_with_second_moment(self) -> Index:
        """The index for TrackStar and the other methods with V and R."""
        return self.index(TRACKSTAR)

    def proponents_of_wrong_answers(
        self, wrong_facts: Sequence[Fact], facts: Sequence[Fact]
    ) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
        """Rows and scores of TrackStar's first k candidates for wrong answers, with R_eval of the
        correct facts (§7.1); λ is 0 for other kinds of questions.

        Args:
            wrong_facts: Facts whose object is the model's wrong answer.
            facts: The report's facts.
        """
        queries = to_queries(wrong_facts)
        task = to_queries(facts, self._config.templates[0])
        sources = {
            "queries": [(query.prompt, query.completion) for query in queries],
            "task": [(query.query_id, query.prompt, query.completion) for query in task],
            "index": self.index(TRACKSTAR).manifest.to_json(),
            "damping": self._config.damping,
            "top_k": self._config.top_k,
            "kinds": [query.kind for query in (*queries, *task)],
        }

        def compute() -> dict[str, Any]:
            top = self._gradient_scores(TRACKSTAR, queries, task, None).sort(dim=1, descending=True, stable=True)
            k = self._config.top_k
            return {"rows": top.indices[:, :k].tolist(), "scores": top.values[:, :k].tolist()}

        saved = self._workspace.result("rankings/wrong answers", sources, compute)
        return [(tuple(rows), tuple(scores)) for rows, scores in zip(saved["rows"], saved["scores"], strict=True)]

    def ranking(self, method: str, facts: Sequence[Fact], *, template: int = 0, side: int | None = None) -> Ranking:
        """A method's ranking, from the report's folder if it is there.

        Args:
            method: Name of the method; see `METHODS`.
            facts: The facts to trace.
            template: Number of the prompt.
            side: Side of a gradient method's projections; None is the report's.
        """
        name = f"rankings/{method} template {template}" + (f" side {side}" if side is not None else "")
        sources = self.sources(method, facts, template, side)
        saved = self._workspace.result(name, sources, lambda: self._compute(method, facts, template, side))
        return Ranking(
            ranks=tuple(map(tuple, saved["ranks"])),
            rows=tuple(map(tuple, saved["rows"])),
            scores=tuple(map(tuple, saved["scores"])),
        )

    def sources(self, method: str, facts: Sequence[Fact], template: int, side: int | None = None) -> dict[str, Any]:
        """All that a ranking depends on, as JSON values."""
        config = self._config
        sources: dict[str, Any] = {
            "method": method,
            "facts": [(fact.fact_id, fact_digest(fact)) for fact in facts],
            "template": template,
            "strict": config.strict,
            "top_k": config.top_k,
            "corpus": self.index(TRACKSTAR).manifest.corpora[0].digest,
        }
        if method == "embeddings":
            assert config.embedding_model is not None
            sources["embedding_model"] = pretrained_digest(config.embedding_model)
        if method == "random":
            sources["seed"] = config.seed
        of_gradients = gradient_method(method)
        if of_gradients is not None:
            sources["index"] = self.index(of_gradients, side=side).manifest.to_json()
            sources["damping"] = config.damping
        return sources

    def scores(
        self, method: str, facts: Sequence[Fact], template: int, side: int | None = None
    ) -> Float[Tensor, "queries candidates"]:
        """A method's scores of all candidates; they are not saved."""
        queries = to_queries(facts, template)
        of_gradients = GRADIENT_METHODS.get(method)
        if of_gradients is None:
            return self._retriever(method, facts, side).scores(queries)
        return self._gradient_scores(of_gradients, queries, queries, side)

    def scores_by_kernels_of_pools(
        self, facts: Sequence[Fact], template: int, pools: Sequence[Int64[np.ndarray, "_"]]
    ) -> list[Float[Tensor, "_"]]:
        """TRAK's scores of each query's own pool, with the kernel of that pool; they are not saved."""
        retriever = self._retriever(TRAK.name, facts, None)
        assert isinstance(retriever, TRAKRetriever)
        return retriever.scores_by_kernels_of_pools(to_queries(facts, template), pools)

    def _compute(self, method: str, facts: Sequence[Fact], template: int, side: int | None) -> dict[str, Any]:
        """A method's ranking as JSON values."""
        scores = self.scores(method, facts, template, side)
        of_facts = evidence(facts, self.pool.row_of, strict=self._config.strict)
        top = scores.sort(dim=1, descending=True, stable=True)
        k = min(self._config.top_k, len(self.pool))
        rows, values = top.indices[:, :k].tolist(), top.values[:, :k].tolist()
        if method == "gold":
            # The gold ranking consists of gold examples only; all others have score 0.
            counts = [sum(value > 0 for value in of_query) for of_query in values]
            rows = [of_query[:count] for of_query, count in zip(rows, counts, strict=True)]
            values = [of_query[:count] for of_query, count in zip(values, counts, strict=True)]
        known = [number for number, gold in enumerate(of_facts.gold) if gold]
        ranks: list[list[int]] = [[] for _ in facts]
        of_known = gold_ranks(
            scores[known],
            [of_facts.gold[number] for number in known],
            left_out=[of_facts.left_out[number] for number in known],
        )
        for number, found in zip(known, of_known, strict=True):
            ranks[number] = found
        return {"ranks": ranks, "rows": rows, "scores": values}

    def _gradient_scores(
        self, method: GradientMethod, queries: Sequence[Query], task: Sequence[Query], side: int | None
    ) -> Float[Tensor, "queries candidates"]:
        """Scores of a gradient method, with R_eval of the facts among the task's queries.

        R is specific to the task for facts only; questions of other kinds are ranked with λ = 0
        (Appendix A.5).
        """
        indexed = self._indexed(method, self._side(method, side))
        damping = self._config.damping
        of_facts = [number for number, query in enumerate(queries) if query.asks_for_fact]
        others = [number for number, query in enumerate(queries) if not query.asks_for_fact]
        groups = [
            (of_facts, GradientRetriever(method, indexed, task=[q for q in task if q.asks_for_fact], damping=damping)),
            (others, GradientRetriever(method, indexed, mixing=0.0, damping=damping)),
        ]
        scores = torch.empty(len(queries), len(self.pool))
        for numbers, retriever in groups:
            if numbers:
                scores[numbers] = retriever.scores([queries[number] for number in numbers])
        return scores

    def _retriever(self, method: str, facts: Sequence[Fact], side: int | None) -> Retriever:
        config = self._config
        if method == "gold":
            gold = {
                f.fact_id: f.gold_strict if config.strict and f.kind == "fact" else (*f.gold_strict, *f.gold)
                for f in facts
            }
            return GoldRetriever(self.pool, {fact_id: tuple(dict.fromkeys(ids)) for fact_id, ids in gold.items()})
        if method == "random":
            return RandomRetriever(self.pool, seed=config.seed)
        if method == "BM25":
            return BM25Retriever(self.pool, progress=self._progress)
        if method == "embeddings":
            assert config.embedding_model is not None
            encoder = load_encoder(config.embedding_model, device=config.device)
            return EmbeddingRetriever(self.pool, encoder, progress=self._progress)
        if method.startswith("TRAK"):
            per = "tokens" if method.endswith("tokens") else "examples"
            return TRAKRetriever(
                self._indexed(TRAK, self._side(TRAK, side)),
                per=per,
                damping=config.damping,
                seed=config.seed,
                batch_tokens=config.batch_tokens,
            )
        raise AssertionError(f"{method} is a gradient method")

    def _side(self, method: GradientMethod, side: int | None) -> int:
        """The given side, or the report's for a method."""
        return usual_side(self._config, method) if side is None else side

    def _indexed(self, method: GradientMethod, side: int) -> IndexedGradients:
        """The index for a method with this side, built if it does not exist.

        Two-sided projections with a smaller side than the report's are cut out of the report's
        index.
        """
        key = (method.output, method.second_moment, method.projection, side)
        if key not in self._gradients:
            config = self._config
            out = Path(self._workspace.folder) / "indexes" / index_name(config, method, side)
            if is_narrowed(config, method, side):
                index = narrow_index(self.index(method), out, side=side, progress=self._progress)
            else:
                index = self._build(method, side, out)
            self._gradients[key] = IndexedGradients(
                index, self._model, batch_tokens=config.batch_tokens, workers=self._workers, progress=self._progress
            )
        return self._gradients[key]

    def _build(self, method: GradientMethod, side: int, out: Path) -> Index:
        """Index the corpus for a method."""
        config = self._config
        return index_corpus(
            self._model, candidates_of(config), out, index_settings(config, method, side), workers=self._workers,
            progress=self._progress, planned=False,
        )  # fmt: skip


def usual_side(config: EvaluationConfig, method: GradientMethod) -> int:
    """The report's side for a method."""
    return min(config.side) if method.projection == "one-sided" else config.side[0]


def is_narrowed(config: EvaluationConfig, method: GradientMethod, side: int) -> bool:
    """Whether an index is cut out of one with a larger side, without computing gradients."""
    return side < config.side[0] and method.projection == "two-sided"


def index_name(config: EvaluationConfig, method: GradientMethod, side: int) -> str:
    """Name of the folder of a method's index."""
    name = f"{method.output}-{'V' if method.second_moment else 'plain'}-{side}"
    if method.projection == "one-sided":
        name += "-one-sided"
    return f"{name}-of-{config.side[0]}" if is_narrowed(config, method, side) else name


def index_settings(config: EvaluationConfig, method: GradientMethod, side: int) -> ChosenSettings:
    """What a method's index is asked to be."""
    return ChosenSettings(
        second_moment=config.second_moment if method.second_moment else "none",
        side=side,
        seed=config.seed,
        codec=config.codec,
        batch_tokens=config.batch_tokens,
        output=method.output,
        projection=method.projection,
    )


def candidates_of(config: EvaluationConfig) -> Corpus:
    """The corpus of a report."""
    return open_corpus(
        config.corpus, text_field=config.text_field, id_field=config.id_field, limit=config.limit,
        duplicate_ids=config.duplicate_ids,
    )  # fmt: skip


def gradient_method(name: str) -> GradientMethod | None:
    """The gradients of a method; None if it needs no index of its own."""
    return GRADIENT_METHODS.get(name) or (TRAK if name.startswith("TRAK") else None)
