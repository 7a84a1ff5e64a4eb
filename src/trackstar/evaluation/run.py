"""A whole report in order: facts, answers, rankings, tail-patch, wrong answers; resumable, then tables and figures.

What is computed is kept in the report's folder (`workspace.py`); running the same settings again only draws anew.
"""

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int64

from trackstar.attribution.attributor import has_own_training, training_step
from trackstar.baselines.interface import Pool
from trackstar.corpus import Example
from trackstar.errors import OptionError
from trackstar.evaluation.categories import Category
from trackstar.evaluation.config import EvaluationConfig, TailPatchConfig
from trackstar.evaluation.effects import Effects, chosen_queries, mean_effects, measured_effects
from trackstar.evaluation.fact_selection import balanced_sample
from trackstar.evaluation.facts import Fact, read_facts, to_queries
from trackstar.evaluation.frequency import fact_frequencies
from trackstar.evaluation.matching import answer_is_correct
from trackstar.evaluation.open_set import Judgements, judged_proponents
from trackstar.evaluation.proponents import categories_of_wrong_answers, proponent_categories
from trackstar.evaluation.rankings import Ranking, Rankings
from trackstar.evaluation.variants import Variants, variants
from trackstar.evaluation.workspace import Workspace
from trackstar.model.generation import generate
from trackstar.model.language_model import LanguageModel, load_model
from trackstar.progress import Progress
from trackstar.workers.protocol import THIS_PROCESS, Workers


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EffectsOfMethods:
    """Tail-patch of every method over the same queries.

    Attributes:
        queries: Places of the queries among the report's.
        by_method: Method (or TrackStar's variant, such as `TrackStar, side 16`) and k to each query's mean effect over
            its first k proponents, a fraction.
        step: What the training step was.
        by_learning_rate: Method and learning rate to each query's mean effect over the main number of proponents, for
            every rate of the settings; empty where there is one.
    """

    queries: tuple[int, ...]
    by_method: Mapping[tuple[str, int], Float64[np.ndarray, "queries"]]
    step: str
    by_learning_rate: Mapping[tuple[str, float], Float64[np.ndarray, "queries"]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EvaluationReport:
    """What a report found.

    Attributes:
        config: Its settings.
        facts: The facts that were asked for.
        answers: What the model itself said to each, greedily.
        correct: Whether that is right.
        frequencies: In how many candidates each fact's entities stand together.
        pool: The candidates that were ranked.
        rankings: By method and template.
        variants: TrackStar's rankings by the side of its projections, and by checkpoint (Figure 2).
        effects: Tail-patch, or None where it was not asked for.
        judgements: Of every method's proponents by the entailment model, or None where none was given.
        categories: Of each method's proponents, by fact (Figure 3); without judgements gold examples stand for those
            that entail it.
        wrong_answers: Categories by names alone of TrackStar's proponents for the truth and for the model's own wrong
            answer (§7.1), by fact's place.
        description: Model, coverage, V and R, for people.
    """

    config: EvaluationConfig
    facts: tuple[Fact, ...]
    answers: tuple[str, ...]
    correct: Bool[np.ndarray, "facts"]
    frequencies: Int64[np.ndarray, "facts"]
    pool: Pool
    rankings: Mapping[tuple[str, int], Ranking]
    variants: Variants
    effects: EffectsOfMethods | None
    judgements: Judgements | None
    categories: Mapping[str, tuple[tuple[Category, ...], ...]]
    wrong_answers: Mapping[int, tuple[tuple[Category, ...], tuple[Category, ...]]]
    description: tuple[str, ...]

    @property
    def candidates(self) -> int:
        """How many candidates were ranked."""
        return len(self.pool)


def run_evaluation(
    config: EvaluationConfig, out: str | os.PathLike[str], *, workers: Workers = THIS_PROCESS, progress: bool = True
) -> EvaluationReport:
    """Compute a report, or what is missing of it.

    Args:
        config: Its settings.
        out: Its folder.
        workers: Who makes indexes and computes gradients.
        progress: Whether bars may be shown.

    Raises:
        TrackstarError: See `trackstar.errors`.
    """
    facts = chosen_facts(config)
    for template in config.templates:
        to_queries(facts, template)  # a missing prompt is an error before any work
    workspace = Workspace(out)
    model = load_model(config.model, device=config.device)
    if config.tail_patch is not None:
        _check_learning_rates(config.tail_patch, model)
    rankings = Rankings(config, model, workspace, workers=workers, progress=progress)
    answers = _answers(facts, model, workspace, config, progress)
    correct = np.array(
        [answer_is_correct(a, f.object.name, f.object.aliases) for a, f in zip(answers, facts, strict=True)]
    )
    of_method = {
        (method, template): rankings.ranking(method, facts, template=template)
        for method in config.methods
        for template in config.templates
    }
    main = {method: of_method[method, config.templates[0]] for method in config.methods}
    others = variants(config, facts, rankings, model, workspace, workers=workers, progress=progress)
    effects = None
    if config.tail_patch is not None:
        methods = config.tail_patch.methods or config.methods
        measured = {method: main[method] for method in methods} | others.others(config)
        effects = _effects(config, config.tail_patch, measured, facts, rankings, model, workspace, progress)
    judgements = None
    if config.entailment_model is not None:
        judgements = judged_proponents(
            main, facts, rankings.pool, config.entailment_model, workspace,
            template=config.templates[0], device=config.device, progress=progress,
        )  # fmt: skip
    texts = [Example(example_id=n, text=t, record=0) for n, t in zip(*_pool(rankings), strict=True)]
    return EvaluationReport(
        config=config,
        facts=facts,
        answers=tuple(answers),
        correct=correct,
        frequencies=fact_frequencies(facts, texts, progress=progress),
        pool=rankings.pool,
        rankings=of_method,
        variants=others,
        effects=effects,
        judgements=judgements,
        categories={
            method: proponent_categories(ranking, facts, rankings, judgements) for method, ranking in main.items()
        },
        wrong_answers=categories_of_wrong_answers(facts, answers, correct, main, rankings, config),
        description=_description(model, rankings, config),
    )


def chosen_facts(config: EvaluationConfig) -> tuple[Fact, ...]:
    """The report's facts: at most `queries`, evenly over relations, of the half that is asked for.

    Halves are drawn by the facts' names alone, so that a fact is in the same half whatever else is asked.

    Raises:
        OptionError: None is left.
    """
    facts = [fact for fact in read_facts(config.facts) if not config.strict or fact.gold_strict]
    if config.half != "all":
        facts = [fact for fact in facts if half_of(fact.fact_id) == config.half]
    if config.queries is not None and config.queries < len(facts):
        facts = _evenly(facts, config.queries, config.seed)
    if not facts:
        which = " with strict gold examples" if config.strict else ""
        raise OptionError(
            f"{config.facts}: no fact{which} is left to ask for; expected one or more of the half {config.half}"
        )
    without = next((fact for fact in facts if not fact.gold), None)
    if without is not None:
        raise OptionError(
            f"{config.facts}: fact {without.fact_id} has no gold example (gold or trex_sentences); name one or leave "
            "the fact out"
        )
    return tuple(facts)


def half_of(fact_id: str) -> str:
    """`development` or `report`, by the fact's name alone."""
    return "report" if hashlib.blake2b(f"half {fact_id}".encode()).digest()[0] & 1 else "development"


def _evenly(facts: Sequence[Fact], count: int, seed: int) -> list[Fact]:
    """`count` facts, as many of each relation as can be."""
    kept: tuple[Fact, ...] = ()
    for most in range(1, len(facts) + 1):
        larger = balanced_sample(facts, per_relation=most, per_object=len(facts), seed=seed)
        if len(larger) >= count:
            # Some of the last round are too many: those that the smaller sample has stay first.
            names = {fact.fact_id for fact in kept}
            added = [fact for fact in larger if fact.fact_id not in names][: count - len(kept)]
            chosen = names | {fact.fact_id for fact in added}
            return [fact for fact in facts if fact.fact_id in chosen]
        kept = larger
    return list(facts)


def _pool(rankings: Rankings) -> tuple[Sequence[str], Sequence[str]]:
    return rankings.pool.example_ids, rankings.pool.texts


def _answers(
    facts: Sequence[Fact], model: LanguageModel, workspace: Workspace, config: EvaluationConfig, progress: bool
) -> list[str]:
    queries = to_queries(facts, config.templates[0])

    def make() -> list[str]:
        with Progress("The model's own answers", unit="queries", total=len(queries), shown=progress) as bar:
            found = []
            for query in queries:
                found.append(generate(model, query.prompt, max_new_tokens=12))
                bar.advance(1)
            return found

    sources: dict[str, Any] = {
        "model": model.digest(),
        "tokenizer": model.tokenizer_digest(),
        "prompts": [query.prompt for query in queries],
    }
    return workspace.kept("answers", sources, make)


def _effects(
    config: EvaluationConfig,
    asked: TailPatchConfig,
    chosen: Mapping[str, Ranking],
    facts: Sequence[Fact],
    rankings: Rankings,
    model: LanguageModel,
    workspace: Workspace,
    progress: bool,
) -> EffectsOfMethods:
    index = rankings.index_with_second_moment()
    queries, deepest = chosen_queries(facts, asked.queries), max(asked.top_k)
    rates = asked.learning_rate or (None,)
    steps = [training_step(model, index, rate) for rate in rates]
    step = steps[0]
    effects: Effects = {}
    by_rate: dict[tuple[str, float], Any] = {}
    for rate, one in zip(rates, steps, strict=True):
        found = measured_effects(
            chosen, facts, index, model, one, asked, workspace, learning_rate=rate,
            template=config.templates[0], batch_tokens=config.batch_tokens, progress=progress,
        )  # fmt: skip
        effects = found if one is step else effects
        if rate is not None:
            by_rate |= {(m, rate): mean_effects(chosen[m], found, queries, deepest) for m in chosen}
    return EffectsOfMethods(
        queries=tuple(queries),
        by_method={(m, k): mean_effects(chosen[m], effects, queries, k) for m in chosen for k in asked.top_k},
        step=step.description,
        by_learning_rate=by_rate if len(steps) > 1 else {},
    )


def _check_learning_rates(config: TailPatchConfig, model: LanguageModel) -> None:
    if config.learning_rate and has_own_training(model):
        raise OptionError(
            f"tail_patch.learning_rate is {list(config.learning_rate)}, but {model.source} goes on with its own run's; "
            "leave it out"
        )


def _description(model: LanguageModel, rankings: Rankings, config: EvaluationConfig) -> tuple[str, ...]:
    manifest = rankings.index_with_second_moment().manifest
    return (
        f"model: {model.source}, {model.architecture}, gradients of {model.coverage}",
        f"candidates: {len(rankings.pool):,} of {config.corpus}",
        f"V: {manifest.second_moment.kind}, {manifest.second_moment.source}",
        f"φ: {manifest.dimensions:,} dimensions in {len(manifest.layer_blocks)} layer blocks, {manifest.codec}",
    )
