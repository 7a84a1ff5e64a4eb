"""Check an audit: compare it with the available inputs and, on request, answer its queries again
(Eq. 1-3).

Another machine computes other last digits. Rankings must be equal candidate for candidate; scores,
λ and the damping may differ by `TOLERANCE`. Derived files of an index are not used, only what
`verify` and the manifest vouch for.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trackstar.attribution.answering import answer_queries
from trackstar.attribution.results import QueryReport
from trackstar.attribution.streaming import stream_queries
from trackstar.audit.checks import AtHand, AuditReport, Check, InputChecks, Outcome
from trackstar.audit.record import Audit, read_audit
from trackstar.corpus import Query
from trackstar.errors import OptionError
from trackstar.model.generation import continuations, generate
from trackstar.model.generation_settings import GenerationSettings
from trackstar.model.language_model import LanguageModel
from trackstar.store import Index

# Influences lie between -1 and 1; the key is the dtype of the gradient computation.
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}

_ANSWER = ("is_8b_correct", "model_answer")
_SCORES = ("proponent_scores", "opponent_scores")


def check_audit(
    path: str | os.PathLike[str],
    hand: AtHand | None = None,
    *,
    again: bool = False,
    progress: bool = True,
) -> AuditReport:
    """Compare an audit with the available inputs.

    Args:
        path: The audit file.
        hand: The available inputs; None is the result file beside the audit.
        again: Whether to answer the queries again and compare rankings and scores.
        progress: Whether progress is shown.

    Returns:
        What is the same, what differs, and what was not checked.

    Raises:
        AuditError: The file is not an audit.
        OptionError: An input is given that the audit does not refer to, or an input that `again`
            needs is missing.
        TrackstarError: An input cannot be read; see `trackstar.errors`.
    """
    available = hand or AtHand()
    audit = read_audit(path)
    if again:
        _check_sufficient(audit, available)
    inputs = InputChecks(audit, Path(path), available)
    checks = list(inputs.checks())
    if again:
        outcomes: dict[str, Outcome] = {check.name: check.outcome for check in checks}
        checks += _Recomputation(inputs, progress=progress).checks(outcomes)
    return AuditReport(audit=audit, checks=tuple(checks))


def _check_sufficient(audit: Audit, available: AtHand) -> None:
    """Raise, before any long computation, if an input that the answer depends on is missing.

    Raises:
        OptionError: An input is missing; the message names all of them.
    """
    given = {"model": available.model is not None}
    if audit.index is not None:
        given["index"] = available.index is not None
    else:
        given["data"] = bool(available.data)
    if audit.question.task is not None:
        given["task"] = available.task is not None
    if audit.stream is not None and audit.stream.second_moment == "given":
        given["second_moment"] = available.second_moment is not None
    needed = [f"`{name}`" for name in given]
    missing = [f"`{name}`" for name, is_given in given.items() if not is_given]
    if missing:
        raise OptionError(f"`again=True`: needs {', '.join(needed)}; pass {' and '.join(missing)}")


class _Recomputation:
    """The answer to the audit's question, computed again."""

    def __init__(self, inputs: InputChecks, *, progress: bool) -> None:
        self._inputs = inputs
        self._audit = inputs.audit
        self._progress = progress

    def checks(self, outcomes: Mapping[str, Outcome]) -> Iterator[Check]:
        """Compare the recomputed answer, unless an input check found a difference."""
        # Edited results still name their queries, so that the answer can be compared with each of
        # them.
        ignored = {"results"} if self._inputs.result_queries else set()
        different = [name for name, outcome in outcomes.items() if outcome == "differs" and name not in ignored]
        if different:
            reason = f"not recomputed: with another {', '.join(different)} the answer would differ"
            yield Check(name="answer", outcome="not checked", said=reason)
            return
        if self._audit.generation is not None:
            yield self._completions(self._audit.generation.settings())
        report = self._report()
        yield from self._statistics(report)
        yield from self._settings(report)
        yield from self._rankings(report)

    def _completions(self, settings: GenerationSettings) -> Check:
        model = self._inputs.model
        assert model is not None, "recomputation needs a model"
        queries = self._inputs.result_queries
        different = [query.query_id for query in queries if not _says(model, query, settings)]
        return _check_of_queries("completions", len(queries), different, "the model gives the same text")

    def _queries(self) -> list[Query]:
        """The queries from their file if it is given: results copy fields from it, which are compared too."""
        if self._inputs.queries is not None and self._audit.generation is None:
            return self._inputs.queries
        return self._inputs.result_queries

    def _report(self) -> QueryReport:
        """Answer with the audit's settings."""
        inputs, question = self._inputs, self._audit.question
        options: dict[str, Any] = {
            "k": question.top,
            "mixing": question.mixing,
            "damping": question.damping,
            "task": inputs.task,
            "batch_tokens": question.batch_tokens,
            "progress": self._progress,
        }
        assert inputs.model is not None, "recomputation needs a model"
        if self._audit.stream is None:
            assert inputs.available.index is not None, "recomputation needs the index"
            return answer_queries(
                Index.open(inputs.available.index).without_derived(), self._queries(), model=inputs.model,
                reranked=question.reranked, exact=question.exact, **options,
            )  # fmt: skip
        stream, manifest = self._audit.stream, self._audit.made_with
        second_moment = inputs.available.second_moment
        return stream_queries(
            inputs.model,
            inputs.available.data[0],
            self._queries(),
            **{name: value for name, value in manifest.corpora[0].options.items() if name != "metadata"},
            chat_template=None if manifest.corpora[0].chat_template is None else inputs.available.chat_template,
            duplicate_ids=self._inputs.corpora[0].duplicate_ids if self._inputs.corpora else "refuse",
            window_tokens=manifest.windows.tokens,
            overlap=manifest.windows.overlap,
            truncate=manifest.windows.truncate,
            pack=manifest.windows.pack,
            second_moment=stream.second_moment if second_moment is None else second_moment,
            second_moment_kind="elementwise" if manifest.second_moment.kind == "elementwise" else "factored",
            second_moment_examples=stream.second_moment_examples,
            whitening_examples=stream.whitening_examples,
            side=manifest.projection.side,
            seed=manifest.projection.seed,
            output=manifest.output,
            **options,
        )

    def _statistics(self, report: QueryReport) -> Iterator[Check]:
        """V and R_train of a pass over the corpus; another machine computes other last digits."""
        expected, found = self._audit.stream, report.provenance
        if expected is None or found is None or found.stream is None:
            return
        before, after = self._audit.made_with.second_moment, found.made_with.second_moment
        sources = before.source if before.source == after.source else f"{before.source}; here {after.source}"
        yield _check_of_statistic("V", after.digest, before.digest, sources)
        examples = f"the mean over {expected.r_train_examples:,} examples"
        yield _check_of_statistic("R_train", found.stream.r_train, expected.r_train, examples)

    def _settings(self, report: QueryReport) -> Iterator[Check]:
        """λ, the damping and the number of candidates, which rules decide where the caller does not."""
        answer = self._audit.answer
        for name, found, expected in (
            ("λ", report.mixing.value, answer.mixing), ("damping", report.damping, answer.damping),
        ):  # fmt: skip
            close = abs(found - expected) <= TOLERANCE["float32"] * max(1.0, abs(expected))
            detail = f"{expected:.6g}" if close else f"found {found:.6g}, expected {expected:.6g}"
            yield Check(name=name, outcome="same" if close else "differs", said=detail)
        shape = (report.candidates, report.codec, report.reranked)
        expected_shape = (answer.candidates, answer.codec, answer.reranked)
        detail = _described(*expected_shape)
        if shape != expected_shape:
            detail = f"found {_described(*shape)}; expected {detail}"
        yield Check(name="candidates", outcome="same" if shape == expected_shape else "differs", said=detail)

    def _rankings(self, report: QueryReport) -> Iterator[Check]:
        """The result file, line by line: scores within the tolerance, every other field exactly.

        The model's own answers are compared apart, as they decide no ranking.
        """
        tolerance = TOLERANCE[self._audit.made_with.model.dtype]
        query_set = self._audit.results.query_set
        answered: list[str] = []
        reordered: list[str] = []
        distant: list[str] = []
        largest = 0.0
        for result, query in zip(report.results, self._inputs.result_queries, strict=True):
            found, expected = result.to_release(query_set), dict(query.record)
            if self._audit.audit_version < 3:  # results of that time do not say what stood between the texts
                found.pop("separator")
            if "has_trex_sentence" not in expected:  # results of earlier versions do not say it
                found.pop("has_trex_sentence", None)
            if result.verdict is not None and any(found.pop(one) != expected.pop(one, None) for one in _ANSWER):
                answered.append(query.query_id)
            distance = max(_distance(found.pop(field), expected.pop(field, None)) for field in _SCORES)
            expected = {field: value for field, value in expected.items() if field in found or field not in _ANSWER}
            if json.dumps(found, sort_keys=True) != json.dumps(expected, sort_keys=True):
                reordered.append(query.query_id)
            if distance > tolerance:
                distant.append(query.query_id)
            largest = max(largest, distance)
        judged = sum(result.verdict is not None for result in report.results)
        if judged:
            yield _check_of_queries("model's answers", judged, answered, "the model says and prefers the same")
        yield _check_of_queries("rankings", len(report.results), reordered, "the same candidates in the same order")
        detail = f"differences are at most {tolerance:g}, the largest is {largest:.2g}"
        yield _check_of_queries("scores", len(report.results), distant, detail)


def _says(model: LanguageModel, query: Query, settings: GenerationSettings) -> bool:
    """Whether the model completes a query's prompt as it did: in the same tokens, or in the same text
    for results of an audit before version 3, which has no tokens.
    """
    if query.token_ids is None or query.target_mask is None:
        return _line(generate(model, query.prompt, settings).text) == query.completion
    start = query.target_mask.index(True)
    said = continuations(model, query.prompt, query.token_ids[:start], [0], settings)[0]
    return said.token_ids == query.token_ids


def _line(text: str) -> str:
    """The first line of a text that is not blank, as older versions recorded it."""
    return text.strip().split("\n", 1)[0].rstrip()


def _described(candidates: int, codec: str, reranked: int) -> str:
    return f"{candidates:,} ranked, stored as {codec}, {reranked:,} re-ranked"


def _distance(found: object, expected: object) -> float:
    """Largest difference between two lists of scores; infinite if a value is not such a list."""
    if not isinstance(found, list) or not isinstance(expected, list) or len(found) != len(expected):
        return float("inf")
    if not all(type(value) is float for value in expected):
        return float("inf")
    distances = [abs(one - other) for one, other in zip(found, expected, strict=True)]
    return max((distance if distance == distance else float("inf") for distance in distances), default=0.0)


def _check_of_queries(name: str, count: int, different: Sequence[str], detail: str) -> Check:
    """A check over all queries: the same if none differs, else it names the first that does."""
    if not different:
        return Check(name=name, outcome="same", said=f"{count:,} queries: {detail}")
    return Check(
        name=name, outcome="differs", said=f"{len(different):,} of {count:,} queries, the first is {different[0]}"
    )


def _check_of_statistic(name: str, found: str | None, expected: str | None, source: str) -> Check:
    """A check of V or R_train by digest; a difference is only a note, for scores have a tolerance."""
    if found == expected:
        return Check(name=name, outcome="same", said=f"recomputed, {source}")
    detail = f"has other bytes when recomputed ({source}); the scores below show whether that matters"
    return Check(name=name, outcome="note", said=detail)
