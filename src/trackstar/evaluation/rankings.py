"""Every method's ranking of the candidates for every query: built where it is missing, kept in the report's folder."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
from trackstar.editing.narrowing import narrow_index
from trackstar.evaluation.config import EvaluationConfig
from trackstar.evaluation.facts import Evidence, Fact, evidence, fact_digest, to_queries
from trackstar.evaluation.metrics import QueryMetrics, gold_ranks, metrics_of_ranks
from trackstar.evaluation.workspace import Workspace
from trackstar.gradients.dense_projection import check_flattened_size
from trackstar.indexing.build import build_index
from trackstar.model.language_model import LanguageModel
from trackstar.model.loading import pretrained_digest
from trackstar.store import Index
from trackstar.workers.protocol import THIS_PROCESS, Workers

GRADIENT_METHODS = {method.name: method for method in (*EXPERIMENTS, TRACKSTAR, *OTHER_OUTPUTS, ONE_SIDED)}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """What is kept of one method's scores, query by query.

    Attributes:
        ranks: Ranks of the gold candidates, ascending, those neither right nor wrong taken out.
        rows: The first k candidates as places in the pool, the best first, none taken out.
        scores: Their scores.
    """

    ranks: tuple[tuple[int, ...], ...]
    rows: tuple[tuple[int, ...], ...]
    scores: tuple[tuple[float, ...], ...]

    def metrics(self, *, at: int = 10) -> QueryMetrics:
        """Each query's MRR, recall and precision."""
        return metrics_of_ranks(self.ranks, at=at)


class Rankings:
    """All methods over one pool of candidates.

    The candidates are the rows of an index where there is a gradient method, so that all methods rank the very same.

    Args:
        config: The report's settings.
        model: The model.
        workspace: Where indexes and rankings are kept.
        workers: Who makes indexes and computes gradients.
        progress: Whether bars may be shown.
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
        """The index that serves a method."""
        return self._indexed(method, self._side(method, side)).index

    def index_with_second_moment(self) -> Index:
        """The index that TrackStar and the others with V share."""
        return self.index(TRACKSTAR)

    def ranking_of_answers(self, said: Sequence[Fact], task: Sequence[Fact]) -> tuple[tuple[int, ...], ...]:
        """TrackStar's first k rows for what the model wrongly said, R_eval being of the true facts (§7.1).

        Args:
            said: Facts whose object is the model's own answer.
            task: The report's facts.
        """
        queries = to_queries(said)
        task_queries = to_queries(task, self._config.templates[0])
        sources = {
            "queries": [(query.prompt, query.completion) for query in queries],
            "task": [(query.query_id, query.prompt, query.completion) for query in task_queries],
            "index": self.index(TRACKSTAR).manifest.to_json(),
            "damping": self._config.damping,
            "top_k": self._config.top_k,
        }

        def make() -> list[list[int]]:
            retriever = GradientRetriever(
                TRACKSTAR,
                self._indexed(TRACKSTAR, self._config.side[0]),
                task=task_queries,
                damping=self._config.damping,
            )
            order = retriever.scores(queries).sort(dim=1, descending=True, stable=True).indices
            return order[:, : self._config.top_k].tolist()

        return tuple(map(tuple, self._workspace.kept("rankings/wrong answers", sources, make)))

    def ranking(self, method: str, facts: Sequence[Fact], *, template: int = 0, side: int | None = None) -> Ranking:
        """A method's ranking, from the report's folder where it is there.

        Args:
            method: Its name; see `METHODS`.
            facts: What is asked.
            template: With which prompt.
            side: Of a gradient method's projections; None is the report's.
        """
        name = f"rankings/{method} template {template}" + (f" side {side}" if side is not None else "")
        sources = self._sources(method, facts, template, side)
        kept = self._workspace.kept(name, sources, lambda: self._ranked(method, facts, template, side))
        return Ranking(
            ranks=tuple(map(tuple, kept["ranks"])),
            rows=tuple(map(tuple, kept["rows"])),
            scores=tuple(map(tuple, kept["scores"])),
        )

    def _sources(self, method: str, facts: Sequence[Fact], template: int, side: int | None) -> dict[str, Any]:
        config = self._config
        found: dict[str, Any] = {
            "method": method,
            "facts": [(fact.fact_id, fact_digest(fact)) for fact in facts],
            "template": template,
            "strict": config.strict,
            "top_k": config.top_k,
            "corpus": self.index(TRACKSTAR).manifest.corpora[0].digest,
        }
        if method == "embeddings":
            assert config.embedding_model is not None
            found["embedding_model"] = pretrained_digest(config.embedding_model)
        if method == "random":
            found["seed"] = config.seed
        gradient = GRADIENT_METHODS.get(method) or (TRAK if method.startswith("TRAK") else None)
        if gradient is not None:
            found["index"] = self.index(gradient, side=side).manifest.to_json()
            found["damping"] = config.damping
        return found

    def _ranked(self, method: str, facts: Sequence[Fact], template: int, side: int | None) -> dict[str, Any]:
        scores = self._retriever(method, facts, side).scores(to_queries(facts, template))
        known: Evidence = evidence(facts, self.pool.row_of, strict=self._config.strict)
        top = scores.sort(dim=1, descending=True, stable=True)
        k = min(self._config.top_k, len(self.pool))
        rows, values = top.indices[:, :k].tolist(), top.values[:, :k].tolist()
        if method == "gold":
            # Examples that are not gold are no ranking of it, merely the rest.
            counts = [sum(value > 0 for value in of_query) for of_query in values]
            rows = [of_query[:count] for of_query, count in zip(rows, counts, strict=True)]
            values = [of_query[:count] for of_query, count in zip(values, counts, strict=True)]
        return {
            "ranks": gold_ranks(scores, known.gold, left_out=known.left_out),
            "rows": rows,
            "scores": values,
        }

    def _retriever(self, method: str, facts: Sequence[Fact], side: int | None) -> Retriever:
        config = self._config
        if method == "gold":
            right = {f.fact_id: f.gold_strict if self._config.strict else (*f.gold_strict, *f.gold) for f in facts}
            return GoldRetriever(self.pool, {name: tuple(dict.fromkeys(gold)) for name, gold in right.items()})
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
        gradient = GRADIENT_METHODS[method]
        indexed = self._indexed(gradient, self._side(gradient, side))
        return GradientRetriever(gradient, indexed, damping=config.damping)

    def _side(self, method: GradientMethod, asked: int | None) -> int:
        sides = self._config.side
        if asked is not None:
            return asked
        return min(sides) if method.projection == "one-sided" else sides[0]

    def _indexed(self, method: GradientMethod, side: int) -> IndexedGradients:
        """The index of that output, with V or without, made where it is missing.

        Smaller sides than the report's are cut out of its index.
        """
        key = (method.output, method.second_moment, method.projection, side)
        if key not in self._gradients:
            config = self._config
            name = f"{method.output}-{'V' if method.second_moment else 'plain'}-{side}"
            if method.projection == "one-sided":
                name += "-one-sided"
            is_cut = side < config.side[0] and method.projection == "two-sided"
            if is_cut:
                name += f"-of-{config.side[0]}"
            out = Path(self._workspace.folder) / "indexes" / name
            if is_cut:
                index = narrow_index(self.index(method), out, side=side, progress=self._progress)
            else:
                index = self._built(method, side, out)
            self._gradients[key] = IndexedGradients(
                index, self._model, batch_tokens=config.batch_tokens, workers=self._workers, progress=self._progress
            )
        return self._gradients[key]

    def _built(self, method: GradientMethod, side: int, out: Path) -> Index:
        config = self._config
        return build_index(
            self._model,
            config.corpus,
            out,
            text_field=config.text_field,
            id_field=config.id_field,
            limit=config.limit,
            second_moment=config.second_moment if method.second_moment else "none",
            side=side,
            seed=config.seed,
            codec=config.codec,  # pyright: ignore[reportArgumentType]  # one of the three: `EvaluationConfig`
            batch_tokens=config.batch_tokens,
            output=method.output,
            projection=method.projection,
            workers=self._workers,
            progress=self._progress,
        )
