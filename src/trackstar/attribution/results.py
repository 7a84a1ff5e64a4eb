"""Results: ranked candidates and the settings behind the scores, as data, as a table and as JSON values."""

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from trackstar.attribution.markup import candidates_table, plain
from trackstar.attribution.question import Provenance
from trackstar.attribution.verdicts import Verdict, remark, verdict_lines
from trackstar.corpus import Query, separator
from trackstar.corpus.record_reader import NO_TARGET
from trackstar.curvature.mixing import Mixing

if TYPE_CHECKING:
    import pandas as pd

CARRIED_FIELDS = (
    "fact_id",
    "relation",
    "entity0",
    "entity1",
    "entity0_alias",
    "entity1_alias",
    "entity0_uri",
    "predicate_uri",
    "entity1_uri",
    "trex_sentences",
    "c4_frequency",
    "c4_frequency_bucket",
    "has_trex_sentence",
    "8b_generations",
    "8b_confidence",
    "is_8b_correct",
    "groundtruth",
)
"""Fields of a query's line that the release's result lines repeat."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ranked:
    """One candidate in a ranking.

    Attributes:
        row: Its row in the index.
        example_id: Its name; for a window of a long document, the window's name.
        parent_id: The document's name.
        influence: Its influence (Eq. 1), from -1 to 1.
        text: Its text.
    """

    row: int
    example_id: str
    parent_id: str
    influence: float
    text: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class QueryResult:
    """A query, and the candidates that moved the model towards its completion or away from it.

    Attributes:
        query: The query.
        loss: Sum of the cross-entropies of the completion's tokens, in nats.
        proponents: The most positive candidates, descending.
        opponents: The most negative candidates, ascending.
        missed: Estimated chance that a true proponent was not re-ranked; None if there is no
            estimate, or nothing was re-ranked.
        verdict: The model's own answer, and whether it is right; None if that was not asked.
    """

    query: Query
    loss: float
    proponents: tuple[Ranked, ...]
    opponents: tuple[Ranked, ...]
    missed: float | None = None
    verdict: Verdict | None = None

    @property
    def probability(self) -> float:
        """The model's probability of the completion after the prompt."""
        return math.exp(-self.loss)

    @property
    def remark(self) -> str:
        """The kind of the query and whether the model answers it right, in words; empty if unknown."""
        return remark(self.query, self.verdict)

    def _repr_html_(self) -> str:
        """The result for a notebook. Texts are untrusted and shown as text."""
        lists = (("proponent", self.proponents), ("opponent", self.opponents))
        rows = [
            (role, candidate.influence, candidate.example_id, candidate.text)
            for role, ranking in lists
            for candidate in ranking
        ]
        query = self.query
        question = f"{plain(query.prompt + separator(query))}<b>{plain(query.completion)}</b>"
        said = f" &emsp; [{plain(self.remark)}]" if self.remark else ""
        heading = f"<p dir='auto' style='white-space:pre-wrap'>{question} &emsp; P = {self.probability:.2%}{said}</p>"
        return heading + candidates_table(rows)

    def to_release(self, query_set: str) -> dict[str, object]:
        """One line of the release's result files, field for field, and the query's further fields.

        `separator` is what stands between prompt and completion in the text that was asked. A query
        of tokens has `input_ids`, and `labels`, which are -100 for tokens that are no targets.
        `is_8b_correct` is about this model, whatever its size; `groundtruth` is the right answer where
        the completion is another one.
        """
        record = self.query.record
        token_ids, mask = self.query.token_ids, self.query.target_mask
        tokens: dict[str, object] = {}
        if token_ids is not None and mask is not None:
            labels = [token if target else NO_TARGET for token, target in zip(token_ids, mask, strict=True)]
            tokens = {"input_ids": list(token_ids), "labels": labels}
        return {
            "example_id": self.query.query_id,
            "query_set": query_set,
            "inputs_plaintext": self.query.prompt,
            "separator": separator(self.query),
            "targets_plaintext": self.query.completion,
            **tokens,
            "proponents": [ranked.text for ranked in self.proponents],
            "proponent_ids": [ranked.example_id for ranked in self.proponents],
            "proponent_scores": [ranked.influence for ranked in self.proponents],
            "opponents": [ranked.text for ranked in self.opponents],
            "opponent_ids": [ranked.example_id for ranked in self.opponents],
            "opponent_scores": [ranked.influence for ranked in self.opponents],
            **{field: record[field] for field in CARRIED_FIELDS if field in record},
            **self._kind(),
        }

    def _kind(self) -> dict[str, object]:
        """The fields of the query's kind, and of the model's answer."""
        query, verdict, fields = self.query, self.verdict, dict[str, object]()
        if query.kind is not None:
            fields["kind"] = query.kind
        if query.alternatives:
            fields["alternative"] = list(query.alternatives)
        if query.truth == "":
            fields["groundtruth"] = None
        elif query.truth is not None and query.truth.strip() != query.completion.strip():
            fields["groundtruth"] = query.truth
        if "has_trex_sentence" not in query.record and isinstance(query.record.get("trex_sentences"), list):
            fields["has_trex_sentence"] = bool(query.record["trex_sentences"])
        if verdict is not None:
            fields |= {"is_8b_correct": verdict.correct, "model_answer": verdict.answer}
        return fields


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class QueryReport:
    """Every query's result, and the settings behind the scores.

    Attributes:
        results: One per query, in the queries' order.
        mixing: λ, the rule that gave it, both spectra and their ranks.
        damping: Ridge added to R_train, as a fraction of its mean eigenvalue per block.
        damping_rule: The source of the damping, in words.
        candidates: Number of candidates.
        codec: The index's codec; `none` for a streamed corpus.
        reranked: Candidates per query, at each end of the store's ranking, that were re-ranked; all
            candidates in an exact pass.
        recomputed: Number of candidates whose gradients were recomputed, over all queries.
        index: The index's folder, or the streamed corpus.
        model: Path or name that the model was loaded from.
        coverage: The weight matrices that gradients are of, and their share of the parameters.
        second_moment: The source of V.
        notes: Further lines for the user, such as an old format of the index.
        provenance: The options and digests that `write_audit` writes; None for an unfinished index.
    """

    results: tuple[QueryResult, ...]
    mixing: Mixing
    damping: float
    damping_rule: str
    candidates: int
    codec: str
    reranked: int
    recomputed: int
    index: str
    model: str
    coverage: str
    second_moment: str
    provenance: Provenance | None = None
    notes: tuple[str, ...] = ()

    def _repr_html_(self) -> str:
        """The settings and the first ten results, for a notebook."""
        settings = "<br>".join(plain(line) for line in self.summary())
        shown = "".join(result._repr_html_() for result in self.results[:10])
        more = f"<p>and {len(self.results) - 10:,} more</p>" if len(self.results) > 10 else ""
        return f"<details><summary>{len(self.results):,} queries</summary>{settings}</details>{shown}{more}"

    def to_dataframe(self) -> "pd.DataFrame":
        """One row per ranked candidate: query and whether the model answers it right, role (`proponent`
        or `opponent`), rank from 1, influence, text.
        """
        import pandas as pd

        queries = ["query_id", "prompt", "completion", "loss", "probability", "kind", "correct", "model_answer"]
        candidates = ["role", "rank", "influence", "example_id", "parent_id", "row", "text"]
        rows = [
            (
                result.query.query_id,
                result.query.prompt,
                result.query.completion,
                result.loss,
                result.probability,
                result.query.kind,
                None if result.verdict is None else result.verdict.correct,
                None if result.verdict is None else result.verdict.answer,
                role,
                rank,
                ranked.influence,
                ranked.example_id,
                ranked.parent_id,
                ranked.row,
                ranked.text,
            )
            for result in self.results
            for role, ranking in (("proponent", result.proponents), ("opponent", result.opponents))
            for rank, ranked in enumerate(ranking, start=1)
        ]
        return pd.DataFrame(rows, columns=[*queries, *candidates])

    def summary(self) -> list[str]:
        """The settings behind the scores, one per line."""
        mixing = self.mixing
        lines = [
            f"{'corpus' if self.codec == 'none' else 'index'}: {self.index}, {self.candidates:,} candidates",
            self._ranking(),
            f"gradients of {self.coverage}",
            f"V: {self.second_moment}",
            f"weight of the task's queries in the correction: λ = {mixing.value:.4f} ({mixing.rule})",
        ]
        if mixing.rank:
            lines.append(
                f"  R_eval, from {mixing.queries:,} queries: rank {mixing.evaluation_rank:,} over all blocks, singular "
                f"values {_spread(mixing.evaluation_spectrum)}, {mixing.evaluation_value:.3g} at rank {mixing.rank:,}"
            )
            lines.append(
                f"  R_train: rank {mixing.train_rank:,} over all blocks, singular values "
                f"{_spread(mixing.train_spectrum)}, {mixing.train_value:.3g} at rank {mixing.rank:,}"
            )
        lines.append(f"damping {self.damping:.4g} ({self.damping_rule})")
        lines += verdict_lines([r.query for r in self.results], [r.verdict for r in self.results])
        return [*lines, *self.notes]

    def _ranking(self) -> str:
        """How candidates were ranked, and the chance that the ranking misses a true proponent."""
        if self.reranked == self.candidates:
            return "ranking: exact, by the recomputed gradient of every candidate"
        if not self.reranked:
            return f"ranking: by the {self.codec} store"
        line = (
            f"ranking: the {self.reranked:,} best and worst by the {self.codec} store, re-ranked by recomputed "
            f"gradients (of {self.recomputed:,} examples)"
        )
        chances = sorted(result.missed for result in self.results if result.missed is not None)
        if chances:
            median, most = chances[len(chances) // 2], chances[-1]
            line += f"; estimated chance that a true proponent is missing: {_chance(median)}"
            line += f" (median; at most {_chance(most)})" if len(chances) > 1 else ""
            line += "; `exact=True` ranks without misses"
        return line

    def to_json(self) -> dict[str, Any]:
        """What the release's lines have no field for: λ and both spectra, ranks, damping, coverage,
        losses.
        """
        return {
            "index": self.index,
            "model": self.model,
            "candidates": self.candidates,
            "codec": self.codec,
            "reranked": self.reranked,
            "recomputed": self.recomputed,
            "coverage": self.coverage,
            "second_moment": self.second_moment,
            "mixing": dataclasses.asdict(self.mixing),
            "damping": self.damping,
            "damping_rule": self.damping_rule,
            "queries": [_query_json(result) for result in self.results],
        }


def _query_json(result: QueryResult) -> dict[str, object]:
    fields: dict[str, object] = {
        "query_id": result.query.query_id, "loss": result.loss, "probability": result.probability,
        "missed": result.missed,
    }  # fmt: skip
    if result.verdict is not None:
        fields |= {"correct": result.verdict.correct, "model_answer": result.verdict.answer}
        if result.verdict.log_probabilities:
            fields["log_probabilities_of_choice"] = list(result.verdict.log_probabilities)
    return fields


def _chance(chance: float) -> str:
    """A chance in words, to two digits."""
    return "below 0.0001" if chance < 1e-4 else f"{chance:.2g}"


def _spread(spectrum: tuple[float, ...]) -> str:
    """The largest and the smallest singular value listed."""
    return f"{spectrum[0]:.3g} to {spectrum[-1]:.3g}" if spectrum else "not computed"
