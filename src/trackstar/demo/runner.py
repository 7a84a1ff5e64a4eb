"""The demo: train a small model on real facts, index its corpus, and explain its answers."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from trackstar.attribution.answering import answer_queries, query_gradients
from trackstar.attribution.results import QueryReport, QueryResult
from trackstar.attribution.terminal import print_line, print_query_result, print_table
from trackstar.attribution.writing import check_writable, write_results
from trackstar.corpus import Query
from trackstar.corpus.matching import answer_is_correct
from trackstar.curvature.task import task_correction
from trackstar.demo.common import SIDE, DemoFiles, Stopwatch, check_folder, interval, is_report_of, write_inputs
from trackstar.demo.facts import DEMO_PRETRAINING, DemoCorpus, demo_corpus
from trackstar.editing.converting import convert_index
from trackstar.evaluation.comparisons import Estimate, compare, estimate
from trackstar.evaluation.metrics import QueryMetrics, gold_ranks, metrics_of_ranks
from trackstar.indexing.build import build_index
from trackstar.model.generation import Generation, generate
from trackstar.model.generation_settings import GenerationSettings
from trackstar.model.language_model import LanguageModel, load_model
from trackstar.pretraining import pretrain
from trackstar.retrieval.scoring import Scorer, all_scores, cosine_scorer, dot_product_scorer, trackstar_scorer
from trackstar.store import Index, row_bytes
from trackstar.store.files.outputs import check_replaceable, replace_text

_SHOWN_CORRECT, _SHOWN_WRONG = 6, 4
_RERANKED = 100


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DemoReport:
    """The demo's measurements, as written to `report.json`.

    Attributes:
        accuracy: Share of the queries that the model answers correctly.
        mrr: Mean reciprocal rank over all queries, by method.
        recall: Recall@10 by method: the share of queries with a gold sentence among the first ten.
        overlap: Share of the exact first ten that the 1-bit store finds, before and after
            re-ranking.
        answers: The model's own completion, by query.
        seconds: Wall time, by stage.
    """

    accuracy: float
    mrr: Mapping[str, Estimate]
    recall: Mapping[str, Estimate]
    overlap: Mapping[str, float]
    answers: Mapping[str, str]
    seconds: Mapping[str, float]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DemoRun:
    """What a run of the demo returns: its measurements and its files."""

    report: DemoReport
    files: DemoFiles


def run_demo(out: Path, *, seed: int = 0) -> DemoRun:
    """Run the whole demo in `out` and print its steps; an interrupted run is resumed.

    Leaves `corpus.jsonl`, `queries.jsonl`, the checkpoints in `model/`, the indexes `index/`,
    `index-without-v/` and `index-1-bit/`, `results.jsonl` and `report.json`.

    Raises:
        TrackstarError: `out` cannot be written, or holds other files under these names.
    """
    watch = Stopwatch()
    check_folder(out, "facts")
    corpus = demo_corpus(seed)
    check_writable(out / "results.jsonl")
    check_replaceable(out / "report.json", is_report_of(DemoReport))
    sentences, queries = _write_inputs(corpus, out)
    print_line(
        f"1. Corpus: {len(corpus.sentences):,} sentences about {len(corpus.queries):,} facts of the real world, and "
        f"distractors: {sentences}"
    )
    print_line("2. Training a language model on the corpus from scratch, with Adafactor")
    checkpoint = pretrain(str(sentences), out / "model", DEMO_PRETRAINING)
    watch.lap("training")
    model = load_model(checkpoint)
    print_line(f"   {model.coverage.total_parameters:,} parameters, trained in {watch.seconds['training']:.0f} s")
    settings = GenerationSettings(max_new_tokens=12)
    generations = {query.query_id: generate(model, query.prompt, settings) for query in corpus.queries}
    answers = {name: generation.text.strip() for name, generation in generations.items()}
    correct = [query for query in corpus.queries if _is_correct(query, answers[query.query_id])]
    accuracy = len(correct) / len(corpus.queries)
    print_line(f"   it answers {len(correct)} of {len(corpus.queries)} questions correctly ({accuracy:.0%})")
    watch.lap("answering")
    index, without_v = _built_indexes(model, sentences, out)
    watch.lap("indexing")
    print_line("4. Which training examples made the model say that?")
    print_line("   P: the model's probability of the answer; numbers: influence, from -1 to 1; ★: states the fact")
    report = _shown_queries(index, model, corpus, generations)
    write_results(report, out / "results.jsonl")
    for result in report.results:
        gold = corpus.gold[_fact_of(result.query)]
        print_query_result(result, gold=set(gold), title=_title(result, corpus, answers))
    watch.lap("shown queries")
    print_line("5. Does it find the sentences that state the fact? All facts, all sentences:")
    methods = _evaluated(index, without_v, model, corpus)
    watch.lap("evaluation")
    _print_methods(methods)
    print_line("6. The same index in one bit per dimension, and the best candidates re-ranked from their gradients:")
    overlap = _small_store(index, out / "index-1-bit", model, corpus)
    watch.lap("small store")
    measured = DemoReport(
        accuracy=accuracy,
        mrr={name: estimate(metrics.reciprocal_rank) for name, metrics in methods.items()},
        recall={name: estimate(metrics.recall) for name, metrics in methods.items()},
        overlap=overlap,
        answers=answers,
        seconds=watch.seconds,
    )
    replace_text(out / "report.json", json.dumps(dataclasses.asdict(measured), indent=1, allow_nan=False))
    prompt = corpus.queries[0].prompt
    files = DemoFiles(index=out / "index", queries=queries, results=out / "results.jsonl", prompt=prompt)
    return DemoRun(report=measured, files=files)


def _built_indexes(model: LanguageModel, sentences: Path, out: Path) -> tuple[Index, Index]:
    """The corpus indexed with V, and for comparison without V."""
    print_line("3. Indexing every training example with V of the run's optimizer state, and without V to compare")
    index = build_index(model, str(sentences), out / "index", side=SIDE, codec="float16")
    without_v = build_index(
        model, str(sentences), out / "index-without-v", side=SIDE, second_moment="none", codec="float16"
    )
    return index, without_v


def _write_inputs(corpus: DemoCorpus, out: Path) -> tuple[Path, Path]:
    """Write the corpus and the queries, if they do not exist yet."""
    stating = {name for names in corpus.gold.values() for name in names}
    sentences = [
        {
            "id": example.example_id,
            "text": example.text,
            "topic": example.example_id.rsplit("-", 2)[0],
            "role": "states a fact" if example.example_id in stating else "distractor",
        }
        for example in corpus.sentences
    ]
    queries = [
        {**query.record, "query_id": query.query_id, "prompt": query.prompt, "completion": query.completion}
        for query in corpus.queries
    ]
    return write_inputs(out, sentences, queries)


def _is_correct(query: Query, answer: str) -> bool:
    return answer_is_correct(answer, query.completion)


def _fact_of(query: Query) -> str:
    return query.query_id.removesuffix(" (model's answer)")


def _shown_queries(
    index: Index, model: LanguageModel, corpus: DemoCorpus, generations: Mapping[str, Generation]
) -> QueryReport:
    """Answer about ten queries, some that the model answers correctly and some that it does not.

    A wrong answer is explained, token for token, instead of the correct one.
    """
    chosen: list[Query] = []
    by_relation: dict[object, int] = {}
    for correct, most in ((True, _SHOWN_CORRECT), (False, _SHOWN_WRONG)):
        queries = [q for q in corpus.queries if _is_correct(q, generations[q.query_id].text.strip()) is correct]
        # The first query of each relation, then the second of each, so that all relations are
        # shown.
        queries.sort(key=lambda query: _occurrence(by_relation, query))
        for query in queries[:most]:
            generation = generations[query.query_id]
            if correct or not generation.text.strip():
                chosen.append(query)
            else:
                chosen.append(generation.query(f"{query.query_id} (model's answer)", record=query.record))
        by_relation.clear()
    return answer_queries(index, chosen, model=model, k=3, task=corpus.queries)


def _occurrence(seen: dict[object, int], query: Query) -> int:
    relation = query.record.get("relation")
    seen[relation] = seen.get(relation, 0) + 1
    return seen[relation]


def _title(result: QueryResult, corpus: DemoCorpus, answers: Mapping[str, str]) -> str:
    fact = _fact_of(result.query)
    truth = next(query.completion for query in corpus.queries if query.query_id == fact)
    if _is_correct(dataclasses.replace(result.query, completion=truth), answers[fact]):
        return "correct"
    return f"wrong, correct is {truth}"


def _evaluated(index: Index, without_v: Index, model: LanguageModel, corpus: DemoCorpus) -> dict[str, QueryMetrics]:
    """Metrics of TrackStar and of the gradient methods of Table 2, over all queries and candidates."""
    phi, _ = query_gradients(index, model, corpus.queries)
    raw, _ = query_gradients(without_v, model, corpus.queries)
    correction = task_correction(index, phi)
    only_train = task_correction(index, phi, mixing=0.0)
    scorers: dict[str, tuple[Index, Scorer]] = {
        "gradient dot product": (without_v, dot_product_scorer(without_v, raw)),
        "gradient cosine": (without_v, cosine_scorer(without_v, raw)),
        "cosine, V": (index, cosine_scorer(index, phi)),
        "cosine, V, R_train": (index, trackstar_scorer(index, phi, only_train.whitening)),
        "TrackStar": (index, trackstar_scorer(index, phi, correction.whitening)),
    }
    rows = {example.example_id: row for row, example in enumerate(corpus.sentences)}
    gold = [[rows[name] for name in corpus.gold[query.query_id]] for query in corpus.queries]
    return {
        name: metrics_of_ranks(gold_ranks(all_scores(store, scorer), gold)) for name, (store, scorer) in scorers.items()
    }


def _small_store(index: Index, out: Path, model: LanguageModel, corpus: DemoCorpus) -> dict[str, float]:
    """Convert the index and compare the first ten of every query with the exact first ten."""
    small = convert_index(index, out, codec="1-bit")
    ways = {"by the store": {"reranked": 0}, "re-ranked": {"reranked": _RERANKED}, "exact": {"exact": True}}
    reports = {name: answer_queries(small, corpus.queries, model=model, k=10, **way) for name, way in ways.items()}
    exact = [{ranked.row for ranked in result.proponents} for result in reports.pop("exact").results]
    overlap = {
        name: sum(
            len(rows & {ranked.row for ranked in result.proponents}) / len(rows)
            for rows, result in zip(exact, report.results, strict=True)
        )
        / len(exact)
        for name, report in reports.items()
    }
    sizes = [row_bytes(one.manifest.codec, one.dimensions, len(one.manifest.layer_blocks)) for one in (small, index)]
    print_line(
        f"   {sizes[0]:,} bytes per example instead of {sizes[1]:,}; it finds {overlap['by the store']:.0%} of the "
        f"exact first ten, and {overlap['re-ranked']:.1%} if {_RERANKED} of {small.rows:,} candidates are re-ranked"
    )
    return overlap


def _print_methods(methods: Mapping[str, QueryMetrics]) -> None:
    rows = [
        (name, interval(estimate(metrics.reciprocal_rank)), interval(estimate(metrics.recall)))
        for name, metrics in methods.items()
    ]
    print_table(("method", "MRR (95% interval)", "recall@10 (95% interval)"), rows)
    ours = methods["TrackStar"].reciprocal_rank
    for name in ("gradient dot product", "gradient cosine", "cosine, V, R_train"):
        difference = compare(ours, methods[name].reciprocal_rank).difference
        change = "Mixing the queries' R_eval into R" if name == "cosine, V, R_train" else "Correcting by V and R"
        verdict = f"{change} {'raises' if difference.low > 0 else 'does not raise'} MRR here"
        print_line(
            f"{verdict}: TrackStar's MRR minus that of {name} is {difference.mean:+.3f} "
            f"({difference.low:+.3f} to {difference.high:+.3f})."
        )
