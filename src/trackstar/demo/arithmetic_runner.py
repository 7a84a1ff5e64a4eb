"""The arithmetic demo: train a small model on sums, and explain its answers to sums that it never saw."""

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from trackstar.attribution.answering import answer_queries
from trackstar.attribution.results import QueryReport, QueryResult
from trackstar.attribution.terminal import print_line, print_query_result
from trackstar.attribution.verdicts import Verdict
from trackstar.attribution.writing import check_writable, write_results
from trackstar.corpus.matching import answer_is_correct
from trackstar.demo.arithmetic import ARITHMETIC_PRETRAINING, LARGEST, Sum, Sums, drawn_sums, number_in, record_of
from trackstar.demo.common import (
    SIDE,
    DemoFiles,
    Stopwatch,
    check_folder,
    interval,
    is_report_of,
    write_inputs,
)
from trackstar.demo.sharing import Explained, ExplainedAnswers, SharedTables, print_tables, tables_of
from trackstar.evaluation.comparisons import Estimate, estimate
from trackstar.indexing.build import build_index
from trackstar.model.generation import Generation, generate
from trackstar.model.generation_settings import GenerationSettings
from trackstar.model.language_model import LanguageModel, load_model
from trackstar.pretraining import PretrainingConfig, pretrain
from trackstar.store import Index
from trackstar.store.files.outputs import check_replaceable, replace_text

PROPONENTS = 10
"""Proponents per answer, in results and tables."""

_SHOWN = 4
_SHOWN_PROPONENTS = 5
_OWN = " (model's answer)"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ArithmeticReport:
    """The arithmetic demo's measurements, as written to `report.json`.

    Attributes:
        accuracy: Share of the held-out sums that the model answers correctly.
        accuracy_by_mirrored_sum: The same for sums whose mirrored sum is trained on, and for the others.
        tables: What proponents share with their questions.
        mixing: λ, the weight of R_eval.
        answers: The model's own answer, by query.
        seconds: Wall time, by stage.
    """

    accuracy: Estimate
    accuracy_by_mirrored_sum: Mapping[str, Estimate]
    tables: SharedTables
    mixing: float
    answers: Mapping[str, str]
    seconds: Mapping[str, float]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ArithmeticRun:
    """What a run of the arithmetic demo returns: its measurements and its files."""

    report: ArithmeticReport
    files: DemoFiles


def run_arithmetic_demo(
    out: Path, *, seed: int = 0, largest: int = LARGEST, training: PretrainingConfig = ARITHMETIC_PRETRAINING
) -> ArithmeticRun:
    """Run the arithmetic demo in `out` and print its steps; an interrupted run is resumed.

    Leaves `corpus.jsonl`, `queries.jsonl`, the checkpoints in `model/`, the index `index/`,
    `results.jsonl` with the proponents of every answer, and `report.json`.

    Args:
        out: The run's folder.
        seed: Seed of the split into training sums and held-out sums.
        largest: Largest result of a sum.
        training: Settings of the model and of its training.

    Raises:
        TrackstarError: `out` cannot be written, or holds other files under these names.
    """
    watch = Stopwatch()
    check_folder(out, "arithmetic")
    sums = drawn_sums(seed, largest=largest)
    check_writable(out / "results.jsonl")
    check_replaceable(out / "report.json", is_report_of(ArithmeticReport))
    corpus, queries = _write_inputs(sums, out)
    print_line(
        f"1. Corpus: {len(sums.training):,} sums with results up to {largest}: {corpus}; {len(sums.held_out):,} other "
        "sums are held out, to ask"
    )
    model = _trained_model(corpus, out / "model", training, watch)
    generations = _generations(model, sums)
    accuracy, by_mirrored = _print_accuracy(generations, sums)
    _print_errors(generations)
    watch.lap("answering")
    print_line("3. Indexing every training sum with V of the run's optimizer state")
    index = build_index(model, str(corpus), out / "index", side=SIDE, codec="float16")
    watch.lap("indexing")
    print_line("4. Which training sums moved the model to its answers?")
    report = _explanations(index, model, generations, sums)
    write_results(report, out / "results.jsonl")
    answers = _by_answer(report, generations, sums)
    _print_examples(answers, report.mixing.value)
    watch.lap("explaining")
    print_line(f"5. What do the {PROPONENTS} strongest proponents of an answer share with the question?")
    tables = tables_of(answers, sums)
    print_tables(tables)
    watch.lap("tables")
    measured = ArithmeticReport(
        accuracy=accuracy,
        accuracy_by_mirrored_sum=by_mirrored,
        tables=tables,
        mixing=report.mixing.value,
        answers={one.name: generation.text.strip() for one, generation in generations.items()},
        seconds=watch.seconds,
    )
    replace_text(out / "report.json", json.dumps(dataclasses.asdict(measured), indent=1, allow_nan=False))
    prompt = sums.held_out[0].prompt
    files = DemoFiles(index=out / "index", queries=queries, results=out / "results.jsonl", prompt=prompt)
    return ArithmeticRun(report=measured, files=files)


def _trained_model(corpus: Path, run: Path, training: PretrainingConfig, watch: Stopwatch) -> LanguageModel:
    """The model trained on the corpus, or that of an earlier run."""
    print_line("2. Training a language model on the corpus from scratch, with Adafactor; each digit is a token")
    checkpoint = pretrain(str(corpus), run, training)
    watch.lap("training")
    model = load_model(checkpoint)
    print_line(f"   {model.coverage.total_parameters:,} parameters, trained in {watch.seconds['training']:.0f} s")
    return model


def _write_inputs(sums: Sums, out: Path) -> tuple[Path, Path]:
    """Write the training sums and the held-out ones, if they do not exist yet."""
    asked = [one.query for one in sums.held_out]
    queries = [
        {"query_id": query.query_id, **query.record, "prompt": query.prompt, "completion": query.completion}
        for query in asked
    ]
    return write_inputs(out, [record_of(one) for one in sums.training], queries)


def _generations(model: LanguageModel, sums: Sums) -> dict[Sum, Generation]:
    """The model's own answers to the held-out sums: a space, two digits and room for the end."""
    settings = GenerationSettings(max_new_tokens=4)
    return {one: generate(model, one.prompt, settings) for one in sums.held_out}


def _is_right(one: Sum, generation: Generation) -> bool:
    return answer_is_correct(generation.text.strip(), str(one.result))


def _print_accuracy(generations: Mapping[Sum, Generation], sums: Sums) -> tuple[Estimate, dict[str, Estimate]]:
    """Print and return the share of right answers, overall and by whether the mirrored sum is trained on."""
    training = set(sums.training)
    right = {one: float(_is_right(one, generation)) for one, generation in generations.items()}
    accuracy = estimate(np.array(list(right.values())))
    print_line(
        f"   it answers {sum(right.values()):.0f} of {len(right):,} held-out sums correctly: {interval(accuracy)}"
    )
    groups: dict[str, list[float]] = {"trained on": [], "held out, too": []}
    for one, value in right.items():
        if one.mirrored != one:
            groups["trained on" if one.mirrored in training else "held out, too"].append(value)
    found = {name: estimate(np.array(values)) for name, values in groups.items() if values}
    for name, share in found.items():
        print_line(f"   with the mirrored sum (b + a) {name}: {interval(share)} of {share.queries:,}")
    return accuracy, found


def _print_errors(generations: Mapping[Sum, Generation]) -> None:
    """Print how far wrong answers are from the true results."""
    wrong = [
        (one, number_in(generation.text)) for one, generation in generations.items() if not _is_right(one, generation)
    ]
    errors = Counter(abs(number - one.result) for one, number in wrong if number is not None)
    if errors:
        print_line(
            f"   of {len(wrong):,} wrong answers, {errors[10]:,} are wrong by exactly 10, the value of a carry, "
            f"{errors[1]:,} by 1, and {len(wrong) - errors[10] - errors[1]:,} otherwise"
        )


def _explanations(index: Index, model: LanguageModel, generations: Mapping[Sum, Generation], sums: Sums) -> QueryReport:
    """Proponents of every held-out sum's true answer, and of the model's own answer where it is wrong.

    A wrong answer is explained token for token. An empty answer has nothing to explain.
    """
    own = []
    for one, generation in generations.items():
        first = _first_visible(generation)
        if first is not None and not _is_right(one, generation):
            own.append(generation.query(f"{one.name}{_OWN}", first=first, record=one.query.record))
    asked = [one.query for one in sums.held_out]
    report = answer_queries(index, [*asked, *own], model=model, k=PROPONENTS, mixing=0.0)
    by_name = {name: one for one in sums.held_out for name in (one.name, one.name + _OWN)}
    results = tuple(
        _judged(result, by_name[result.query.query_id], generations[by_name[result.query.query_id]])
        for result in report.results
    )
    return dataclasses.replace(report, results=results)


def _judged(result: QueryResult, one: Sum, generation: Generation) -> QueryResult:
    """The result with the kind of the query and the model's own answer, which is known already."""
    is_own = result.query.query_id.endswith(_OWN)
    query = dataclasses.replace(result.query, kind="generation", truth=str(one.result) if is_own else None)
    verdict = Verdict(answer=generation.text.strip(), correct=_is_right(one, generation))
    return dataclasses.replace(result, query=query, verdict=verdict)


def _first_visible(generation: Generation) -> int | None:
    """The first generated token that is not white space, so that the targets are those of a true answer."""
    texts = [generation.text[token.start : token.stop] for token in generation.tokens]
    return next((number for number, text in enumerate(texts) if text.strip()), None)


def _by_answer(report: QueryReport, generations: Mapping[Sum, Generation], sums: Sums) -> ExplainedAnswers:
    """The results as right answers, wrong ones and the true ones to the latter."""
    results = {result.query.query_id: result for result in report.results}
    right = [one for one in sums.held_out if _is_right(one, generations[one])]
    wrong = [one for one in sums.held_out if one.name + _OWN in results]
    return ExplainedAnswers(
        right=tuple(Explained.of(results[one.name], one) for one in right),
        wrong=tuple(Explained.of(results[one.name + _OWN], one) for one in wrong),
        truth=tuple(Explained.of(results[one.name], one) for one in wrong),
    )


def _print_examples(answers: ExplainedAnswers, mixing: float) -> None:
    """Print the first few right answers, and wrong ones with the true answer below each."""
    print_line(
        f"   λ = {mixing:g}: R is that of the training sums alone (paper, Appendix A.5), since the questions are not a "
        "task apart from them"
    )
    print_line("   P: the model's probability of the answer; numbers: influence, from -1 to 1; ★: the mirrored sum")
    shown = [(one, "right") for one in answers.right[:_SHOWN]]
    for own, true in zip(answers.wrong[:_SHOWN], answers.truth, strict=False):
        shown += [(own, f"wrong, correct is {own.asked.result}"), (true, "the true answer to the same sum")]
    for one, title in shown:
        result = dataclasses.replace(
            one.result,
            proponents=one.result.proponents[:_SHOWN_PROPONENTS],
            opponents=one.result.opponents[:1],
        )
        print_query_result(result, gold={one.asked.mirrored.name}, title=title)
