"""Compute a report: facts, the model's answers, rankings, tail-patch, categories (paper, §4 to §7).

Every result is saved in the report's folder (`workspace.py`). An interrupted run is resumed; a
second run with the same settings computes nothing.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int64

from trackstar.attribution.attributor import has_training_state, training_step
from trackstar.baselines.interface import Pool
from trackstar.corpus import Example
from trackstar.corpus.digests import draw_bytes
from trackstar.errors import OptionError
from trackstar.evaluation.categories import Category
from trackstar.evaluation.config import EvaluationConfig, TailPatchConfig
from trackstar.evaluation.effects import Effects, Measurement, chosen_queries, mean_effects, measured_effects
from trackstar.evaluation.fact_files import read_facts
from trackstar.evaluation.fact_selection import balanced_sample
from trackstar.evaluation.facts import Fact, to_queries
from trackstar.evaluation.frequency import fact_frequencies
from trackstar.evaluation.open_set import Judgements, judged_proponents
from trackstar.evaluation.own_answers import own_answers, with_own_completions
from trackstar.evaluation.plan import EvaluationPlan, plan_evaluation
from trackstar.evaluation.pool_sizes import PoolSizes, check_pool_sizes, ranks_by_pool_size
from trackstar.evaluation.proponents import WrongAnswer, proponent_categories, traced_wrong_answers
from trackstar.evaluation.rankings import Ranking, Rankings
from trackstar.evaluation.variants import Variants, variants
from trackstar.evaluation.workspace import Workspace, check_folder
from trackstar.model.language_model import LanguageModel, load_model
from trackstar.progress import Progress
from trackstar.store.files.outputs import Input, inputs, refuse_input_folder
from trackstar.workers.protocol import THIS_PROCESS, Workers


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EffectsOfMethods:
    """Tail-patch of every method on the same queries.

    Attributes:
        queries: Numbers of the queries among the report's.
        by_method: Method (or variant of TrackStar, such as `TrackStar, side 16`) and k to each
            query's mean effect over its first k proponents, a fraction.
        step: Description of the training step.
        by_learning_rate: Method and learning rate to each query's mean effect over the largest k,
            for every rate of the settings; empty if there is only one rate.
    """

    queries: tuple[int, ...]
    by_method: Mapping[tuple[str, int], Float64[np.ndarray, "queries"]]
    step: str
    by_learning_rate: Mapping[tuple[str, float], Float64[np.ndarray, "queries"]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EvaluationReport:
    """The results of an evaluation.

    Attributes:
        config: Settings of the report.
        facts: The facts that were traced, and questions of other kinds.
        answers: The model's own answer to each, decoded greedily; of a choice, the completion that it
            prefers.
        correct: Whether the answer is correct.
        judged: Whether the question has a right answer: all but open ones.
        frequencies: Number of candidates that name both entities of each fact.
        pool: The candidates.
        rankings: Method and template to the ranking.
        variants: TrackStar's rankings by side and by checkpoint (Figure 2).
        pool_sizes: Ranks in smaller pools; None if the settings have none.
        effects: Tail-patch; None if it was not measured.
        judgements: Judgements of all proponents by the entailment model; None without one.
        categories: Method to the categories of its proponents, per fact (Figure 3); without
            judgements, gold examples are the examples that entail their fact.
        wrong_answers: Number of a question that the model answers wrongly to what TrackStar says of
            that answer (§7.1).
        description: Model, coverage, V and φ, one line each.
    """

    config: EvaluationConfig
    facts: tuple[Fact, ...]
    answers: tuple[str, ...]
    correct: Bool[np.ndarray, "facts"]
    judged: Bool[np.ndarray, "facts"]
    frequencies: Int64[np.ndarray, "facts"]
    pool: Pool
    rankings: Mapping[tuple[str, int], Ranking]
    variants: Variants
    pool_sizes: PoolSizes | None
    effects: EffectsOfMethods | None
    judgements: Judgements | None
    categories: Mapping[str, tuple[tuple[Category, ...], ...]]
    wrong_answers: Mapping[int, WrongAnswer]
    description: tuple[str, ...]

    @property
    def candidates(self) -> int:
        """Number of candidates."""
        return len(self.pool)

    @property
    def with_gold(self) -> Bool[np.ndarray, "facts"]:
        """Whether a question has gold examples, so that a ranking can be scored on it."""
        return np.array([bool(fact.gold) for fact in self.facts])


def run_evaluation(
    config: EvaluationConfig, out: str | os.PathLike[str], *, workers: Workers = THIS_PROCESS, progress: bool = True
) -> EvaluationReport:
    """Compute the results of a report that are not in its folder yet.

    Args:
        config: Settings of the report.
        out: Folder of the report.
        workers: The workers that build indexes and compute gradients.
        progress: Whether progress is shown.

    Raises:
        TrackstarError: See `trackstar.errors`.
    """
    facts = _checked_facts(config, out)
    model = load_model(config.model, device=config.device, device_map=config.device_map)
    if config.tail_patch is not None:
        _check_learning_rates(config.tail_patch, model)
    plan = plan_evaluation(config, facts, model, out)
    for line in plan.lines():
        Progress("Planning", unit="indexes", shown=False).note(line)
    plan.check()
    workspace = Workspace(out)
    answers = own_answers(facts, model, workspace, config, progress=progress)
    facts = with_own_completions(facts, answers)
    rankings = Rankings(config, model, workspace, workers=workers, progress=progress)
    by_method = {
        (method, template): rankings.ranking(method, facts, template=template)
        for method in config.methods
        for template in config.templates
    }
    main = {method: by_method[method, config.templates[0]] for method in config.methods}
    variant_rankings = variants(config, facts, rankings, model, workspace, workers=workers, progress=progress)
    effects = None
    if config.tail_patch is not None:
        methods = config.tail_patch.methods or config.methods
        measured = {method: main[method] for method in methods} | variant_rankings.others(config)
        effects = _effects(config, config.tail_patch, measured, facts, rankings, model, workspace, progress)
    judgements = None
    if config.entailment_model is not None:
        judgements = judged_proponents(
            main, facts, rankings.pool, config.entailment_model, workspace,
            template=config.templates[0], device=config.device, progress=progress,
        )  # fmt: skip
    pool = rankings.pool
    examples = [Example(example_id=n, text=t, record=0) for n, t in zip(pool.example_ids, pool.texts, strict=True)]
    return EvaluationReport(
        config=config,
        facts=facts,
        answers=answers.texts,
        correct=answers.correct,
        judged=answers.judged,
        frequencies=fact_frequencies(facts, examples, progress=progress),
        pool=pool,
        rankings=by_method,
        variants=variant_rankings,
        pool_sizes=ranks_by_pool_size(config, facts, rankings, workspace),
        effects=effects,
        judgements=judgements,
        categories={
            method: proponent_categories(ranking, facts, rankings, judgements) for method, ranking in main.items()
        },
        wrong_answers=traced_wrong_answers(facts, answers, main, rankings, config),
        description=_description(model, rankings, config, facts),
    )


def planned_evaluation(config: EvaluationConfig, out: str | os.PathLike[str]) -> EvaluationPlan:
    """The plan of a report, with which `run_evaluation` begins. Nothing is written.

    Args:
        config: Settings of the report.
        out: Folder of the report.

    Raises:
        TrackstarError: Something cannot be read; see `trackstar.errors`.
    """
    facts = _checked_facts(config, out)
    return plan_evaluation(config, facts, load_model(config.model, device=config.device), out)


def _checked_facts(config: EvaluationConfig, out: str | os.PathLike[str]) -> tuple[Fact, ...]:
    """The facts of a report, after the checks that need no model."""
    refuse_input_folder(os.fspath(out), _inputs(config))
    check_folder(Path(out))
    facts = chosen_facts(config)
    for template in config.templates:
        to_queries(facts, template)  # raises if a prompt is missing, before any computation
    check_pool_sizes(config, facts)
    return facts


def _inputs(config: EvaluationConfig) -> list[Input]:
    """The files and folders that a report is computed from."""
    return [
        *inputs(
            model=config.model, corpus=config.corpus, facts=config.facts, second_moment=config.second_moment,
            embedding_model=config.embedding_model, entailment_model=config.entailment_model,
        ),
        *(one for checkpoint in config.checkpoints for one in inputs(checkpoints=checkpoint)),
    ]  # fmt: skip


def chosen_facts(config: EvaluationConfig) -> tuple[Fact, ...]:
    """The facts of a report: at most `queries`, evenly over relations, of the chosen half.

    A fact's half depends on its id only, so that it is the same with all settings.

    Raises:
        OptionError: No fact remains, or one has no gold example.
    """
    facts = [f for f in read_facts(config.facts) if not config.strict or f.gold_strict or f.kind != "fact"]
    if config.half != "all":
        facts = [fact for fact in facts if half_of(fact.fact_id) == config.half]
    if config.queries is not None and config.queries < len(facts):
        facts = _evenly(facts, config.queries, config.seed)
    if not facts:
        which = " with strict gold examples" if config.strict else ""
        raise OptionError(f"`facts`: expected facts{which} in the half {config.half} of {config.facts}, found none")
    without_gold = next((fact for fact in facts if not fact.gold and fact.kind == "fact"), None)
    if without_gold is not None:
        raise OptionError(
            f"`facts`: fact {without_gold.fact_id} of {config.facts} has no gold example (gold or trex_sentences); add "
            "one, or leave the fact out"
        )
    return tuple(facts)


def half_of(fact_id: str) -> str:
    """`development` or `report`; it depends on the fact's id only."""
    return "report" if draw_bytes(f"half {fact_id}".encode(), bits=512)[0] & 1 else "development"


def _evenly(facts: Sequence[Fact], count: int, seed: int) -> list[Fact]:
    """`count` facts, as evenly over relations as possible."""
    smaller: tuple[Fact, ...] = ()
    for per_relation in range(1, len(facts) + 1):
        larger = balanced_sample(facts, per_relation=per_relation, per_object=len(facts), seed=seed)
        if len(larger) >= count:
            # Take all of the smaller sample, and of the larger one as many as are missing.
            ids = {fact.fact_id for fact in smaller}
            added = [fact for fact in larger if fact.fact_id not in ids][: count - len(smaller)]
            chosen = ids | {fact.fact_id for fact in added}
            return [fact for fact in facts if fact.fact_id in chosen]
        smaller = larger
    return list(facts)


def _effects(
    config: EvaluationConfig,
    settings: TailPatchConfig,
    measured: Mapping[str, Ranking],
    facts: Sequence[Fact],
    rankings: Rankings,
    model: LanguageModel,
    workspace: Workspace,
    progress: bool,
) -> EffectsOfMethods:
    """Tail-patch of the measured methods and variants, with every learning rate."""
    index = rankings.index_with_second_moment()
    queries, deepest = chosen_queries(facts, settings.queries), max(settings.top_k)
    rates = settings.learning_rate or (None,)
    steps = [training_step(model, index, rate) for rate in rates]
    main_step = steps[0]
    main_effects: Effects = {}
    by_rate: dict[tuple[str, float], Any] = {}
    for rate, step in zip(rates, steps, strict=True):
        measurement = Measurement(
            facts=facts,
            template=config.templates[0],
            index=index,
            model=model,
            step=step,
            learning_rate=rate,
            config=settings,
            batch_tokens=config.batch_tokens,
        )
        effects = measured_effects(measured, measurement, workspace, progress=progress)
        main_effects = effects if step is main_step else main_effects
        if rate is not None:
            by_rate |= {(m, rate): mean_effects(measured[m], effects, queries, deepest) for m in measured}
    return EffectsOfMethods(
        queries=tuple(queries),
        by_method={
            (m, k): mean_effects(measured[m], main_effects, queries, k) for m in measured for k in settings.top_k
        },
        step=main_step.description,
        by_learning_rate=by_rate if len(steps) > 1 else {},
    )


def _check_learning_rates(config: TailPatchConfig, model: LanguageModel) -> None:
    """Raise if a learning rate is given for a model whose own training determines the step.

    Raises:
        OptionError: The model is a checkpoint of `pretrain`.
    """
    if config.learning_rate and has_training_state(model):
        raise OptionError(
            f"`tail_patch.learning_rate`: expected none for {model.source}, whose step continues its training, found "
            f"{list(config.learning_rate)}; leave it out"
        )


def _description(
    model: LanguageModel, rankings: Rankings, config: EvaluationConfig, facts: Sequence[Fact]
) -> tuple[str, ...]:
    """Lines about the model, the candidates, V, φ and R, for the report's head."""
    manifest = rankings.index_with_second_moment().manifest
    kinds = list(dict.fromkeys(fact.kind for fact in facts if fact.kind != "fact"))
    r = f"R: not specific to the task (λ = 0) for questions of the kind {', '.join(kinds)}, as in Appendix A.5"
    return (
        f"model: {model.source}, {model.architecture}, gradients of {model.coverage}",
        f"candidates: {len(rankings.pool):,} examples of {config.corpus}",
        f"V: {manifest.second_moment.kind}, {manifest.second_moment.source}",
        f"φ: {manifest.dimensions:,} dimensions in {len(manifest.layer_blocks)} layer blocks, {manifest.codec}",
        *([r] if kinds else []),
    )
