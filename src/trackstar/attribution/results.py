"""What a question to an index gives, as data: ranked training examples, and how R was made; as a table and as files.

Results are written as the JSON lines of the paper's public release, so that its viewer reads ours. What the release
has no field for (λ and both spectra, damping, coverage) goes into one JSON report beside them.
"""

import contextlib
import dataclasses
import errno
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trackstar.attribution.markup import passages_table, plain
from trackstar.attribution.question import Asked
from trackstar.corpus import Query
from trackstar.curvature.mixing import Mixing
from trackstar.errors import OptionError
from trackstar.store import is_url

if TYPE_CHECKING:
    import pandas as pd

# Fields of a query's own line that the release's results carry on (design.md, §5).
_CARRIED_FIELDS = (
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
    "is_8b_correct",
    "groundtruth",
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ranked:
    """One candidate in a ranking.

    Attributes:
        row: Its row in the index.
        example_id: Its name; that of a window of a long document.
        parent_id: The document's name.
        influence: Eq. 1's value, from -1 to 1.
        text: Its text.
    """

    row: int
    example_id: str
    parent_id: str
    influence: float
    text: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class QueryResult:
    """A query and the training examples that moved the model towards its completion, or away from it.

    Attributes:
        query: The query.
        loss: The sum of the completion's tokens' cross-entropies, in nats.
        proponents: The most positive candidates, descending.
        opponents: The most negative candidates, ascending.
        missed: Where candidates were ranked again from recomputed gradients, the estimated chance that one of the true
            proponents is not among them; None where nothing can be said, or nothing was ranked again.
    """

    query: Query
    loss: float
    proponents: tuple[Ranked, ...]
    opponents: tuple[Ranked, ...]
    missed: float | None = None

    @property
    def probability(self) -> float:
        """The model's probability of the completion after the prompt."""
        return math.exp(-self.loss)

    def _repr_html_(self) -> str:
        """The result as a notebook shows it; texts are untrusted, and shown as text."""
        lists = (("proponent", self.proponents), ("opponent", self.opponents))
        rows = [(role, one.influence, one.example_id, one.text) for role, ranking in lists for one in ranking]
        asked = f"{plain(self.query.prompt)} <b>{plain(self.query.completion)}</b>"
        return f"<p dir='auto'>{asked} &emsp; P = {self.probability:.2%}</p>{passages_table(rows)}"

    def to_release(self, query_set: str) -> dict[str, object]:
        """One line of the public release's result files, field for field; a query's own further fields follow."""
        record = self.query.record
        return {
            "example_id": self.query.query_id,
            "query_set": query_set,
            "inputs_plaintext": self.query.prompt,
            "targets_plaintext": self.query.completion,
            "proponents": [ranked.text for ranked in self.proponents],
            "proponent_ids": [ranked.example_id for ranked in self.proponents],
            "proponent_scores": [ranked.influence for ranked in self.proponents],
            "opponents": [ranked.text for ranked in self.opponents],
            "opponent_ids": [ranked.example_id for ranked in self.opponents],
            "opponent_scores": [ranked.influence for ranked in self.opponents],
            **{field: record[field] for field in _CARRIED_FIELDS if field in record},
        }


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class QueryReport:
    """Every query's result, and what the scores were made with.

    Attributes:
        results: One a query, in the queries' order.
        mixing: λ, the rule that gave it, both spectra and their ranks.
        damping: Fraction of each block's mean eigenvalue that was added to R.
        damping_rule: In words, where the damping comes from.
        candidates: How many training examples were ranked.
        codec: How the index stores them; `none` where no index was asked.
        reranked: How many of each query's best and worst candidates were ranked again from recomputed gradients; all
            of them in an exact pass.
        recomputed: How many candidates' gradients that took, over all queries.
        index: The index's folder, or the corpus that was gone through without one.
        model: Where the model was loaded from.
        coverage: Which weight matrices the gradients are of, and what share of the parameters they are.
        second_moment: Where V comes from.
        asked: The options and digests that an audit is written from; None where nobody kept them.
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
    asked: Asked | None = None

    def _repr_html_(self) -> str:
        """What the scores were made with and the first ten results, as a notebook shows them."""
        made = "<br>".join(plain(line) for line in self.summary())
        shown = "".join(result._repr_html_() for result in self.results[:10])
        more = f"<p>and {len(self.results) - 10:,} more</p>" if len(self.results) > 10 else ""
        return f"<details><summary>{len(self.results):,} queries</summary>{made}</details>{shown}{more}"

    def to_dataframe(self) -> "pd.DataFrame":
        """One row a ranked candidate: query, role (`proponent` or `opponent`), rank from 1, influence, text."""
        import pandas as pd

        queries = ["query_id", "prompt", "completion", "loss", "probability"]
        candidates = ["role", "rank", "influence", "example_id", "parent_id", "row", "text"]
        rows = [
            (
                result.query.query_id,
                result.query.prompt,
                result.query.completion,
                result.loss,
                result.probability,
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
        """What the scores were made with, in lines for people."""
        mixing = self.mixing
        lines = [
            f"{'corpus' if self.codec == 'none' else 'index'}: {self.index}, {self.candidates:,} candidates",
            self._ranking(),
            f"gradients of {self.coverage}",
            f"V: {self.second_moment}",
            f"λ = {mixing.value:.4f} ({mixing.rule})",
        ]
        if mixing.rank:
            lines.append(
                f"  R_eval of {mixing.queries:,} queries: rank over all blocks {mixing.evaluation_rank:,}, singular "
                f"values {_spread(mixing.evaluation_spectrum)}, {mixing.evaluation_value:.3g} at rank {mixing.rank:,}"
            )
            lines.append(
                f"  R_train: rank over all blocks {mixing.train_rank:,}, singular values "
                f"{_spread(mixing.train_spectrum)}, {mixing.train_value:.3g} at rank {mixing.rank:,}"
            )
        lines.append(f"damping {self.damping:.4g} ({self.damping_rule})")
        return lines

    def _ranking(self) -> str:
        """How the ranking came about, and how likely it is not to be the exact one."""
        if self.reranked == self.candidates:
            return "ranking: exact, from every candidate's gradient computed for it"
        if not self.reranked:
            return f"ranking: by the {self.codec} store"
        line = (
            f"ranking: the {self.reranked:,} best and worst by the {self.codec} store, again from recomputed gradients "
            f"(of {self.recomputed:,} examples)"
        )
        known = sorted(result.missed for result in self.results if result.missed is not None)
        if known:
            middle, most = known[len(known) // 2], known[-1]
            line += f"; estimated chance that a true proponent is missing {middle:.2g}"
            line += f" (median; at most {most:.2g}); --exact checks it" if len(known) > 1 else "; --exact checks it"
        return line

    def to_json(self) -> dict[str, Any]:
        """All that the release's lines do not say: λ and both spectra, ranks, damping, coverage, losses."""
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
            "queries": [
                {"query_id": r.query.query_id, "loss": r.loss, "probability": r.probability, "missed": r.missed}
                for r in self.results
            ],
        }


def release_lines(report: QueryReport, *, query_set: str) -> list[str]:
    """Every result as a line of JSON in the release's format."""
    return [json.dumps(result.to_release(query_set), ensure_ascii=False) for result in report.results]


def check_writable(path: str | os.PathLike[str]) -> None:
    """See before long work whether its results can be written there; what is there is left alone.

    Raises:
        OptionError: They cannot.
    """
    _refuse_url(path)
    target = Path(path)
    with _writing(target) as partial:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        partial.touch()
        partial.unlink()


def write_results(
    report: QueryReport, path: str | os.PathLike[str], *, query_set: str = "queries"
) -> tuple[Path, Path]:
    """Write results as the release's JSON lines, and beside them the report that says how they were made.

    Both files are there whole or not at all.

    Args:
        report: What `answer_queries` gave.
        path: Where the lines go; the report goes beside it as `STEM.report.json`.
        query_set: The release's name for the set of queries.

    Returns:
        The paths of both.

    Raises:
        OptionError: They cannot be written.
    """
    _refuse_url(path)
    lines = Path(path)
    beside = lines.with_name(f"{lines.stem}.report.json")
    replace_text(beside, json.dumps(report.to_json(), indent=1, ensure_ascii=False) + "\n")
    replace_text(lines, "".join(f"{line}\n" for line in release_lines(report, query_set=query_set)))
    return lines, beside


def _refuse_url(path: object) -> None:
    if is_url(path):
        raise OptionError(f"{path}: a URL, expected a file of this machine: only indexes can be written elsewhere")


def replace_text(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all; the folders above it are made.

    Raises:
        OptionError: It cannot be written; what was there before is kept.
    """
    with _writing(path) as partial:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[Path]:
    """A name beside `path`, of which nothing is left if the block fails."""
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise OptionError(
            f"{path}: results cannot be written ({error.strerror or error}); make the place writable, or choose another"
        ) from error


def _spread(spectrum: tuple[float, ...]) -> str:
    """The largest and smallest value kept."""
    return f"{spectrum[0]:.3g} to {spectrum[-1]:.3g}" if spectrum else "not computed"
