"""The plan of an evaluation: a report's indexes, rankings and tail-patch measurements, and what they need."""

import dataclasses
import os
from pathlib import Path

from trackstar.baselines.gradients import TRACKSTAR, GradientMethod
from trackstar.errors import OptionError
from trackstar.evaluation.config import EvaluationConfig
from trackstar.evaluation.effects import chosen_queries
from trackstar.evaluation.facts import Fact
from trackstar.evaluation.rankings import (
    candidates_of,
    gradient_method,
    index_name,
    index_settings,
    is_narrowed,
    usual_side,
)
from trackstar.indexing.plan import IndexPlan, plan_corpus
from trackstar.model.language_model import LanguageModel
from trackstar.text import amount_of_bytes, duration


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationPlan:
    """What a report costs; `str(plan)` is what the command line prints.

    Attributes:
        out: Folder of the report.
        queries: Number of queries.
        templates: Number of prompts of each.
        methods: Names of the methods.
        indexes: Plans of the indexes that are built, the first that of TrackStar.
        narrowed: Number of indexes that are cut out of these, without gradients.
        checkpoints: Number of earlier checkpoints, each with an index like the first.
        patched: Number of queries whose proponents are measured by tail-patch; 0 if none are.
        most_pairs: Most pairs of a query and a proponent that tail-patch measures: pairs that methods share
            are measured once.
    """

    out: str
    queries: int
    templates: int
    methods: tuple[str, ...]
    indexes: tuple[IndexPlan, ...]
    narrowed: int
    checkpoints: int
    patched: int
    most_pairs: int

    @property
    def seconds(self) -> float | None:
        """Time of the gradients of all indexes; None if no batch was measured."""
        times = [plan.needs.seconds for plan in self.indexes if not plan.begun.complete]
        if None in times:
            return None
        first = self.indexes[0].needs.seconds or 0.0
        return sum((time for time in times if time is not None), self.checkpoints * first)

    @property
    def disk(self) -> int:
        """Bytes of all indexes."""
        return sum(plan.stored for plan in self.indexes) + self.checkpoints * self.indexes[0].stored

    def lines(self) -> tuple[str, ...]:
        """The plan, a line for each subject."""
        first = self.indexes[0]
        biggest = max(self.indexes, key=lambda plan: plan.needs.memory)
        free = "free space not checked" if first.free is None else f"{amount_of_bytes(first.free)} free"
        return (
            f"plan: evaluate {len(self.methods)} methods by {self.queries:,} queries for {first.model} at {self.out}",
            f"  candidates: {first.corpus}",
            f"  indexes: {self._indexes()}",
            f"  rankings: {len(self.methods) * self.templates}, of {self.queries:,} queries each",
            f"  tail-patch: {self._tail_patch()}",
            f"  memory: {biggest.needs.memory_in_words()}",
            f"  disk: about {amount_of_bytes(self.disk)} when finished; {free}",
            f"  time: {self._time()}",
        )

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def check(self) -> None:
        """Raise if memory or disk do not suffice.

        Raises:
            OptionError: They do not; the message names the numbers and the settings to change.
        """
        for plan in self.indexes:
            plan.check()
        free, written = self.indexes[0].free, sum(plan.written for plan in self.indexes)
        if free is not None and self.disk - written > free:
            raise OptionError(
                f"`out`: expected a disk with room for the report's indexes, found {amount_of_bytes(free)} free at "
                f"{self.out} and {amount_of_bytes(self.disk - written)} needed; choose another folder, fewer "
                "`methods`, a smaller `side` or a `limit`"
            )

    def _indexes(self) -> str:
        done = sum(plan.begun.complete for plan in self.indexes)
        parts = [f"{len(self.indexes)} with gradients" + (f", {done} of them complete" if done else "")]
        if self.narrowed:
            parts.append(f"{self.narrowed} cut out of them")
        if self.checkpoints:
            parts.append(f"{self.checkpoints} of earlier checkpoints")
        first = self.indexes[0]
        return f"{', '.join(parts)}; {first.dimensions:,} dimensions, {first.settings.codec}, V {first.second_moment}"

    def _tail_patch(self) -> str:
        if not self.patched:
            return "none"
        return f"{self.patched:,} queries, at most {self.most_pairs:,} pairs of a query and a proponent"

    def _time(self) -> str:
        if self.seconds is None:
            return "not measured for so little work"
        beside = "rankings and tail-patch" if self.patched else "rankings"
        batch = next((plan.needs.batch for plan in self.indexes if plan.needs.batch is not None), None)
        measured = (
            "" if batch is None else f", from a first batch of {batch.tokens:,} tokens in {duration(batch.seconds)}"
        )
        return f"about {duration(self.seconds)} for the indexes{measured}; {beside} come on top"


def plan_evaluation(
    config: EvaluationConfig, facts: tuple[Fact, ...], model: LanguageModel, out: str | os.PathLike[str]
) -> EvaluationPlan:
    """Plan a report. Nothing is written.

    Args:
        config: Settings of the report.
        facts: The facts to trace.
        model: The model.
        out: Folder of the report.

    Raises:
        TrackstarError: Something cannot be read; see `trackstar.errors`.
    """
    corpus = candidates_of(config)
    wanted = _wanted_indexes(config)
    plans: list[IndexPlan] = []
    for method, side in wanted:
        if not is_narrowed(config, method, side):
            folder = Path(out) / "indexes" / index_name(config, method, side)
            settings = index_settings(config, method, side)
            plans.append(plan_corpus(model, corpus, folder, settings, like=plans[0] if plans else None))
    patched = most_pairs = 0
    if config.tail_patch is not None:
        patched = len(chosen_queries(facts, config.tail_patch.queries))
        variants = max(0, len(config.side) - 1) + len(config.checkpoints)
        measured = len(config.tail_patch.methods or config.methods) + variants
        rates = max(1, len(config.tail_patch.learning_rate))
        most_pairs = patched * max(config.tail_patch.top_k) * measured * rates
    return EvaluationPlan(
        out=os.fspath(out),
        queries=len(facts),
        templates=len(config.templates),
        methods=config.methods,
        indexes=tuple(plans),
        narrowed=len(wanted) - len(plans),
        checkpoints=len(config.checkpoints),
        patched=patched,
        most_pairs=most_pairs,
    )


def _wanted_indexes(config: EvaluationConfig) -> list[tuple[GradientMethod, int]]:
    """Methods and sides of the indexes of a report, each index once, TrackStar's first."""
    of_methods = [method for name in config.methods if (method := gradient_method(name)) is not None]
    wanted = [(method, usual_side(config, method)) for method in (TRACKSTAR, *of_methods)]
    wanted += [(TRACKSTAR, side) for side in config.side]
    by_name: dict[str, tuple[GradientMethod, int]] = {}
    for method, side in wanted:
        by_name.setdefault(index_name(config, method, side), (method, side))
    return list(by_name.values())
