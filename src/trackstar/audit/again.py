"""An audit from end to end: what is at hand is compared, and where that is asked, the same queries are answered again.

An answer computed on another machine differs in its last digits. Rankings must be equal row for row; scores, λ and the
damping may differ by `TOLERANCE`. Of an index no derived file is used: only what `verify` and the manifest vouch for.
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from trackstar.attribution.answering import answer_queries
from trackstar.attribution.results import QueryReport
from trackstar.attribution.streaming import stream_queries
from trackstar.audit.checks import AtHand, AuditReport, Check, InputChecks, Outcome
from trackstar.audit.record import Audit, read_audit
from trackstar.corpus import Query
from trackstar.errors import OptionError
from trackstar.model.generation import generate
from trackstar.store import Index

# Influences lie between -1 and 1; the dtype is that of the gradients' computation.
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}

_SCORES = ("proponent_scores", "opponent_scores")


def check_audit(
    path: str | os.PathLike[str],
    hand: AtHand | None = None,
    *,
    again: bool = False,
    progress: bool = True,
) -> AuditReport:
    """Compare what an audit says with what is at hand.

    Args:
        path: The audit's file.
        hand: What there is to compare it with; None is the results beside the audit.
        again: Whether the queries are answered again and rankings and scores compared.
        progress: Whether progress is shown where stderr is a terminal.

    Returns:
        What is the same, what differs, and what was not checked.

    Raises:
        AuditError: The file is no audit.
        OptionError: Something is given that the audit says nothing of, or lacks for `again`.
        TrackstarError: Something that was given cannot be read.
    """
    hand = hand or AtHand()
    audit = read_audit(path)
    if again:
        _check_enough(audit, hand)
    inputs = InputChecks(audit, Path(path), hand)
    checks = list(inputs.all())
    if again:
        checks += _Again(inputs, progress=progress).checks({check.name: check.outcome for check in checks})
    return AuditReport(audit=audit, checks=tuple(checks))


def _check_enough(audit: Audit, hand: AtHand) -> None:
    """See before long work that nothing is missing for an answer.

    Raises:
        OptionError: Something is.
    """
    needed = [("--model", hand.model is not None)]
    needed.append(("--index", hand.index is not None) if audit.index is not None else ("--data", bool(hand.data)))
    if audit.question.task is not None:
        needed.append(("--task", hand.task is not None))
    if audit.stream is not None and audit.stream.second_moment == "given":
        needed.append(("--second-moment", hand.second_moment is not None))
    missing = [option for option, given in needed if not given]
    if missing:
        raise OptionError(f"--again: needs {', '.join(option for option, _ in needed)}; give {' and '.join(missing)}")


class _Again:
    """The same question, answered anew."""

    def __init__(self, inputs: InputChecks, *, progress: bool) -> None:
        self._inputs = inputs
        self._audit = inputs.audit
        self._progress = progress

    def checks(self, before: dict[str, Outcome]) -> Iterator[Check]:
        # Results that were edited still say what was asked: which of them differ is then told.
        ignored = {"results"} if self._inputs.answered else set()
        wrong = [name for name, outcome in before.items() if outcome == "differs" and name not in ignored]
        if wrong:
            said = f"not answered again: {', '.join(wrong)} would give another answer"
            yield Check(name="answer", outcome="not checked", said=said)
            return
        if self._audit.generation is not None:
            yield self._completions(self._audit.generation.max_new_tokens)
        report = self._report()
        yield from self._made_anew(report)
        yield from self._decided(report)
        yield from self._rankings(report)

    def _completions(self, max_new_tokens: int) -> Check:
        model = self._inputs.model
        assert model is not None, "--again needs a model"
        asked = self._inputs.answered
        other = [q.query_id for q in asked if generate(model, q.prompt, max_new_tokens=max_new_tokens) != q.completion]
        return _counted("completions", len(asked), other, "the model says what it said")

    def _asked(self) -> list[Query]:
        """From their file where it is there, so that the fields that results carry on are compared with it too."""
        if self._inputs.queries is not None and self._audit.generation is None:
            return self._inputs.queries
        return self._inputs.answered

    def _report(self) -> QueryReport:
        inputs, question = self._inputs, self._audit.question
        options: dict[str, Any] = {
            "k": question.top,
            "mixing": question.mixing,
            "damping": question.damping,
            "task": inputs.task,
            "batch_tokens": question.batch_tokens,
            "progress": self._progress,
        }
        assert inputs.model is not None, "--again needs a model"
        if self._audit.stream is None:
            assert inputs.hand.index is not None, "--again needs the index"
            return answer_queries(
                Index.open(inputs.hand.index).without_derived(), self._asked(), model=inputs.model,
                reranked=question.reranked, exact=question.exact, device=inputs.hand.device, **options,
            )  # fmt: skip
        stream, manifest = self._audit.stream, self._audit.made_with
        return stream_queries(
            inputs.model,
            inputs.hand.data[0],
            self._asked(),
            text_field=manifest.corpora[0].text_field,
            id_field=manifest.corpora[0].id_field,
            limit=manifest.corpora[0].limit,
            window_tokens=manifest.windows.tokens,
            overlap=manifest.windows.overlap,
            second_moment=stream.second_moment if inputs.hand.second_moment is None else inputs.hand.second_moment,
            second_moment_kind="elementwise" if manifest.second_moment.kind == "elementwise" else "factored",
            second_moment_examples=stream.second_moment_examples,
            whitening_examples=stream.whitening_examples,
            side=manifest.projection.side,
            seed=manifest.projection.seed,
            output=manifest.output,
            **options,
        )

    def _made_anew(self, report: QueryReport) -> Iterator[Check]:
        """V and R_train of a pass over the corpus; on another machine they have other last digits."""
        then, now = self._audit.stream, report.asked
        if then is None or now is None or now.stream is None:
            return
        before, after = self._audit.made_with.second_moment, now.made_with.second_moment
        sources = before.source if before.source == after.source else f"{before.source}; here {after.source}"
        yield _anew("V", after.digest, before.digest, sources)
        yield _anew("R_train", now.stream.r_train, then.r_train, f"the mean over {then.r_train_examples:,} examples")

    def _decided(self, report: QueryReport) -> Iterator[Check]:
        then = self._audit.answer
        for name, found, expected in (
            ("λ", report.mixing.value, then.mixing), ("damping", report.damping, then.damping),
        ):  # fmt: skip
            close = abs(found - expected) <= TOLERANCE["float32"] * max(1.0, abs(expected))
            said = f"{expected:.6g}" if close else f"found {found:.6g}, expected {expected:.6g}"
            yield Check(name=name, outcome="same" if close else "differs", said=said)
        shape = (report.candidates, report.codec, report.reranked)
        expected_shape = (then.candidates, then.codec, then.reranked)
        said = "{:,}, store {}, {:,} of them from recomputed gradients".format(*expected_shape)
        if shape != expected_shape:
            said = "found {:,}, store {}, {:,} from recomputed gradients".format(*shape) + f"; expected {said}"
        yield Check(name="candidates", outcome="same" if shape == expected_shape else "differs", said=said)

    def _rankings(self, report: QueryReport) -> Iterator[Check]:
        """The results' lines, field for field: scores within the tolerance, everything else exactly."""
        tolerance = TOLERANCE[self._audit.made_with.model.dtype]
        query_set = self._audit.results.query_set
        moved: list[str] = []
        far: list[str] = []
        largest = 0.0
        for result, query in zip(report.results, self._inputs.answered, strict=True):
            found, expected = result.to_release(query_set), dict(query.record)
            distance = max(_distance(found.pop(field), expected.pop(field, None)) for field in _SCORES)
            if json.dumps(found) != json.dumps(expected):
                moved.append(query.query_id)
            if distance > tolerance:
                far.append(query.query_id)
            largest = max(largest, distance)
        yield _counted("rankings", len(report.results), moved, "the same candidates in the same order")
        said = f"none further apart than {tolerance:g}, the furthest by {largest:.2g}"
        yield _counted("scores", len(report.results), far, said)


def _distance(found: object, expected: object) -> float:
    """The largest difference of two lists of scores; infinite where they are not two such lists."""
    if not isinstance(found, list) or not isinstance(expected, list) or len(found) != len(expected):
        return float("inf")
    if not all(type(value) is float for value in expected):
        return float("inf")
    distances = [abs(one - other) for one, other in zip(found, expected, strict=True)]
    return max((distance if distance == distance else float("inf") for distance in distances), default=0.0)


def _counted(name: str, count: int, other: Sequence[str], said: str) -> Check:
    if not other:
        return Check(name=name, outcome="same", said=f"of {count:,} queries: {said}")
    return Check(name=name, outcome="differs", said=f"of {len(other):,} of {count:,} queries, first {other[0]}")


def _anew(name: str, found: str | None, expected: str | None, what: str) -> Check:
    if found == expected:
        return Check(name=name, outcome="same", said=f"computed anew, {what}")
    said = f"other bytes when computed anew ({what}); the scores below say whether that matters"
    return Check(name=name, outcome="note", said=said)
