"""The demo: train a small model on real facts, index everything it was trained on, ask what moved its answers."""

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path

from trackstar.attribution.answering import answer_queries, query_gradients
from trackstar.attribution.results import QueryReport, QueryResult, write_results
from trackstar.attribution.terminal import print_line, print_query_result, print_table
from trackstar.corpus import Query
from trackstar.curvature.task import task_correction
from trackstar.demo.facts import DEMO_PRETRAINING, DemoCorpus, demo_corpus
from trackstar.editing.converting import convert_index
from trackstar.evaluation.comparisons import Estimate, compare, estimate
from trackstar.evaluation.matching import answer_is_correct
from trackstar.evaluation.metrics import QueryMetrics, gold_ranks, metrics_of_ranks
from trackstar.indexing.build import build_index
from trackstar.model.generation import generate
from trackstar.model.language_model import LanguageModel, load_model
from trackstar.pretraining import pretrain
from trackstar.retrieval.scoring import Scorer, all_scores, cosine_scorer, dot_product_scorer, trackstar_scorer
from trackstar.store import Index, row_bytes

# 16 blocks of 32×32: 16,384 dimensions.
_SIDE = 32
_SHOWN_RIGHT, _SHOWN_WRONG = 6, 4
_RERANKED = 100


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DemoReport:
    """What the demo found.

    Attributes:
        accuracy: Share of the queries that the model answers right.
        mrr: Each method's mean reciprocal rank over all queries, by name.
        recall: Each method's recall@10: the share of queries with a gold sentence among the first ten.
        overlap: Of the exact first ten, the share that a store of one bit a dimension finds, before and after ranking
            again.
        answers: The model's own completion of each query, by query.
        seconds: Wall time of each stage, by name.
    """

    accuracy: float
    mrr: Mapping[str, Estimate]
    recall: Mapping[str, Estimate]
    overlap: Mapping[str, float]
    answers: Mapping[str, str]
    seconds: Mapping[str, float]


def run_demo(out: Path, *, seed: int = 0) -> DemoReport:
    """Run the whole demo in `out` and print what happens; a run that was interrupted goes on.

    Leaves `corpus.jsonl`, `queries.jsonl`, the checkpoints in `model/`, the indexes `index/`, `index-without-v/` and
    `index-1-bit/`, `results.jsonl` and `report.json`.

    Raises:
        TrackstarError: `out` cannot be written, or holds something else.
    """
    seconds: dict[str, float] = {}
    start = time.monotonic()

    def lap(stage: str) -> None:
        nonlocal start
        now = time.monotonic()
        seconds[stage] = round(now - start, 1)
        start = now

    corpus = demo_corpus(seed)
    out.mkdir(parents=True, exist_ok=True)
    sentences, queries = _write_inputs(corpus, out)
    print_line(
        f"1. {len(corpus.sentences):,} sentences about {len(corpus.queries):,} facts of the real world, and "
        f"distractors: {sentences}"
    )
    print_line("2. training a language model on them from scratch, with Adafactor")
    checkpoint = pretrain(str(sentences), out / "model", DEMO_PRETRAINING)
    lap("training")
    model = load_model(checkpoint)
    print_line(f"   {model.coverage.total_parameters:,} parameters, trained in {seconds['training']:.0f} s")
    answers = {query.query_id: generate(model, query.prompt, max_new_tokens=12) for query in corpus.queries}
    right = [query for query in corpus.queries if _is_right(query, answers[query.query_id])]
    accuracy = len(right) / len(corpus.queries)
    print_line(f"   it answers {len(right)} of {len(corpus.queries)} questions right ({accuracy:.0%})")
    lap("answering")
    print_line(
        "3. indexing every training example, V from the run's own optimizer state; once more without V, to compare"
    )
    index = build_index(model, str(sentences), out / "index", side=_SIDE, codec="float16")
    plain = build_index(
        model, str(sentences), out / "index-without-v", side=_SIDE, second_moment="none", codec="float16"
    )
    lap("indexing")
    print_line("4. which training examples made the model say that?")
    print_line("   P: the model's probability of the answer; numbers: influence, from -1 to 1; ★: states the fact")
    report = _shown_queries(index, model, corpus, answers)
    write_results(report, out / "results.jsonl")
    for result in report.results:
        gold = corpus.gold[_fact_of(result.query)]
        print_query_result(result, gold=set(gold), title=_title(result, corpus, answers))
    lap("shown queries")
    print_line("5. does it find the sentences that state the fact? All facts, all sentences:")
    methods = _evaluated(index, plain, model, corpus)
    lap("evaluation")
    _print_methods(methods)
    print_line("6. the same index in one bit a dimension, and the best ranked again from their gradients:")
    overlap = _small_store(index, out / "index-1-bit", model, corpus)
    lap("small store")
    demo = DemoReport(
        accuracy=accuracy,
        mrr={name: estimate(found.reciprocal_rank) for name, found in methods.items()},
        recall={name: estimate(found.recall) for name, found in methods.items()},
        overlap=overlap,
        answers=answers,
        seconds=seconds,
    )
    (out / "report.json").write_text(json.dumps(dataclasses.asdict(demo), indent=1), encoding="utf-8")
    print_line(f"Everything is in {out}. Ask it something yourself:")
    print_line(f'   .venv/bin/trackstar query --index {out / "index"} --prompt "{corpus.queries[0].prompt}" --generate')
    print_line(f"   .venv/bin/trackstar query --index {out / 'index'} --queries {queries} --out answers.jsonl")
    print_line(f"   .venv/bin/trackstar explore {out / 'index'} {out / 'results.jsonl'}")
    return demo


def _write_inputs(corpus: DemoCorpus, out: Path) -> tuple[Path, Path]:
    sentences, queries = out / "corpus.jsonl", out / "queries.jsonl"
    with sentences.open("w", encoding="utf-8") as file:
        stating = {name for names in corpus.gold.values() for name in names}
        for example in corpus.sentences:
            line = {
                "id": example.example_id,
                "text": example.text,
                "topic": example.example_id.rsplit("-", 2)[0],
                "role": "states a fact" if example.example_id in stating else "distractor",
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    with queries.open("w", encoding="utf-8") as file:
        for query in corpus.queries:
            line = {"query_id": query.query_id, "prompt": query.prompt, "completion": query.completion}
            file.write(json.dumps({**query.record, **line}, ensure_ascii=False) + "\n")
    return sentences, queries


def _is_right(query: Query, answer: str) -> bool:
    return answer_is_correct(answer, query.completion)


def _fact_of(query: Query) -> str:
    return query.query_id.removesuffix(" (model's answer)")


def _shown_queries(index: Index, model: LanguageModel, corpus: DemoCorpus, answers: Mapping[str, str]) -> QueryReport:
    """About ten of the queries with what the model itself says: right answers and wrong ones.

    A wrong answer is explained as it is: what made the model say *that*?
    """
    chosen: list[Query] = []
    by_relation: dict[object, int] = {}
    for right, most in ((True, _SHOWN_RIGHT), (False, _SHOWN_WRONG)):
        candidates = [q for q in corpus.queries if _is_right(q, answers[q.query_id]) is right]
        # One relation after the other, so that those shown are of all kinds.
        candidates.sort(key=lambda query: _occurrence(by_relation, query))
        for query in candidates[:most]:
            answer = answers[query.query_id].strip().rstrip(".")
            if right or not answer:
                chosen.append(query)
            else:
                name = f"{query.query_id} (model's answer)"
                chosen.append(dataclasses.replace(query, query_id=name, completion=answer))
        by_relation.clear()
    return answer_queries(index, chosen, model=model, k=3, task=corpus.queries)


def _occurrence(seen: dict[object, int], query: Query) -> int:
    relation = query.record.get("relation")
    seen[relation] = seen.get(relation, 0) + 1
    return seen[relation]


def _title(result: QueryResult, corpus: DemoCorpus, answers: Mapping[str, str]) -> str:
    fact = _fact_of(result.query)
    truth = next(query.completion for query in corpus.queries if query.query_id == fact)
    if _is_right(dataclasses.replace(result.query, completion=truth), answers[fact]):
        return "right"
    return f"wrong, the truth is {truth}"


def _evaluated(index: Index, plain: Index, model: LanguageModel, corpus: DemoCorpus) -> dict[str, QueryMetrics]:
    """TrackStar, and the gradient dot product and cosine of Table 2, over all queries and all candidates."""
    phi, _ = query_gradients(index, model, corpus.queries)
    raw, _ = query_gradients(plain, model, corpus.queries)
    correction = task_correction(index, phi)
    only_train = task_correction(index, phi, mixing=0.0)
    scorers: dict[str, tuple[Index, Scorer]] = {
        "gradient dot product": (plain, dot_product_scorer(plain, raw)),
        "gradient cosine": (plain, cosine_scorer(plain, raw)),
        "cosine, V": (index, cosine_scorer(index, phi)),
        "cosine, V, R_train": (index, trackstar_scorer(index, phi, only_train.whitening)),
        "TrackStar": (index, trackstar_scorer(index, phi, correction.whitening)),
    }
    rows = {example.example_id: row for row, example in enumerate(corpus.sentences)}
    gold = [[rows[name] for name in corpus.gold[query.query_id]] for query in corpus.queries]
    return {
        name: metrics_of_ranks(gold_ranks(all_scores(pool, scorer), gold)) for name, (pool, scorer) in scorers.items()
    }


def _small_store(index: Index, out: Path, model: LanguageModel, corpus: DemoCorpus) -> dict[str, float]:
    """Convert the index and compare the first ten of every query with the exact ones."""
    small = convert_index(index, out, codec="1-bit")
    ways = {"by the store": {"reranked": 0}, "ranked again": {"reranked": _RERANKED}, "exact": {"exact": True}}
    found = {name: answer_queries(small, corpus.queries, model=model, k=10, **way) for name, way in ways.items()}
    exact = [{ranked.row for ranked in result.proponents} for result in found.pop("exact").results]
    overlap = {
        name: sum(
            len(rows & {ranked.row for ranked in result.proponents}) / len(rows)
            for rows, result in zip(exact, report.results, strict=True)
        )
        / len(exact)
        for name, report in found.items()
    }
    bytes_of = [row_bytes(one.manifest.codec, one.dimensions, len(one.manifest.layer_blocks)) for one in (small, index)]
    print_line(
        f"   {bytes_of[0]:,} bytes an example instead of {bytes_of[1]:,}; of the exact first ten it finds "
        f"{overlap['by the store']:.0%}, and {overlap['ranked again']:.1%} with {_RERANKED} of "
        f"{small.rows:,} ranked again"
    )
    return overlap


def _print_methods(methods: Mapping[str, QueryMetrics]) -> None:
    rows = [
        (name, _interval(estimate(found.reciprocal_rank)), _interval(estimate(found.recall)))
        for name, found in methods.items()
    ]
    print_table(("method", "MRR (95% interval)", "recall@10 (95% interval)"), rows)
    ours = methods["TrackStar"].reciprocal_rank
    for name in ("gradient dot product", "gradient cosine", "cosine, V, R_train"):
        found = compare(ours, methods[name].reciprocal_rank)
        what = "Mixing in the task" if name == "cosine, V, R_train" else "Correcting by V and R"
        verdict = f"{what} {'matters' if found.difference.low > 0 else 'does not pay'} here"
        print_line(
            f"{verdict}: TrackStar's MRR minus that of {name} is {found.difference.mean:+.3f} "
            f"({found.difference.low:+.3f} to {found.difference.high:+.3f})."
        )


def _interval(found: Estimate) -> str:
    return f"{found.mean:.3f}  ({found.low:.3f}-{found.high:.3f})"
