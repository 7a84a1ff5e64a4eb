"""Baselines on a T-REx set: how long BM25, embeddings and the scoring of their rankings take, and how good they are.

python benchmarks/baselines.py --trex FOLDER [--queries queries.jsonl] [--embedding-model FOLDER] [--limit N]
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from measurement import save
from trackstar.baselines import BM25Retriever, EmbeddingRetriever, Pool, RandomRetriever, Retriever, load_encoder
from trackstar.corpus import Example, open_corpus
from trackstar.evaluation.comparisons import compare, estimate
from trackstar.evaluation.fact_files import read_facts
from trackstar.evaluation.facts import Fact, evidence, to_queries
from trackstar.evaluation.frequency import fact_frequencies, frequency_bucket
from trackstar.evaluation.metrics import QueryMetrics, gold_ranks, metrics_of_ranks

QUERIES_AT_ONCE = 100
OTHERS_A_QUERY = 20

Result = TypeVar("Result")


def timed(seconds: dict[str, float], step: str, run: Callable[[], Result]) -> Result:
    """Run a step and add how long it took to `seconds`."""
    start = time.perf_counter()
    result = run()
    seconds[step] = round(seconds.get(step, 0) + time.perf_counter() - start, 2)
    return result


def read_pool(corpus: Path, facts: Sequence[Fact], limit: int | None) -> Pool:
    """All sentences; with a limit, the evidence of the facts and the first of the others."""
    if limit is None:
        return Pool.from_examples(open_corpus(corpus).examples())
    needed = {name for fact in facts for name in (*fact.gold, *fact.coref, *fact.maybe_gold)}
    examples = enumerate(open_corpus(corpus).examples())
    return Pool.from_examples(
        example for place, example in examples if place < OTHERS_A_QUERY * limit or example.example_id in needed
    )


def ranks(
    method: Retriever, facts: Sequence[Fact], pool: Pool, seconds: dict[str, float]
) -> tuple[QueryMetrics, QueryMetrics]:
    """The metrics of a method with all gold sentences, and with the strict ones alone."""
    found: tuple[list[list[int]], list[list[int]]] = ([], [])
    for first in range(0, len(facts), QUERIES_AT_ONCE):
        asked = facts[first : first + QUERIES_AT_ONCE]
        queries = to_queries(asked)
        scores = timed(seconds, "scores", lambda queries=queries: method.scores(queries))
        for strict, rows in enumerate(found):
            known = evidence(asked, pool.row_of, strict=bool(strict))
            rows += timed(
                seconds,
                "ranks",
                lambda scores=scores, known=known: gold_ranks(scores, known.gold, left_out=known.left_out),
            )
    return metrics_of_ranks(found[0]), metrics_of_ranks(found[1])


def figures(metrics: QueryMetrics) -> dict[str, list[float]]:
    """Means with their 95% intervals."""
    means = {
        "mrr": estimate(metrics.reciprocal_rank),
        f"recall@{metrics.at}": estimate(metrics.recall),
        f"gold_share@{metrics.at}": estimate(metrics.gold_share),
        f"precision@{metrics.at}": estimate(metrics.precision),
    }
    return {name: [round(value, 4) for value in (e.mean, e.low, e.high)] for name, e in means.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trex", type=Path, required=True, help="folder with sentences.jsonl[.gz] and queries")
    parser.add_argument("--queries", default="queries.jsonl", help="file of queries in it")
    parser.add_argument("--embedding-model", type=Path, help="folder of a sentence-embedding model")
    parser.add_argument("--limit", type=int, help="only N queries, over their evidence and 20 N others; not saved")
    arguments = parser.parse_args()
    reading: dict[str, float] = {}
    corpus = next(path for path in sorted(arguments.trex.glob("sentences.jsonl*")))
    facts = read_facts(arguments.trex / arguments.queries, limit=arguments.limit)
    pool = timed(reading, "read", lambda: read_pool(corpus, facts, arguments.limit))
    methods: dict[str, Callable[[], Retriever]] = {
        "random": lambda: RandomRetriever(pool),
        "BM25": lambda: BM25Retriever(pool),
    }
    if arguments.embedding_model:
        methods["embeddings"] = lambda: EmbeddingRetriever(pool, load_encoder(arguments.embedding_model))
    results: dict[str, Any] = {}
    per_query: dict[str, QueryMetrics] = {}
    for name, build in methods.items():
        seconds: dict[str, float] = {}
        method = timed(seconds, "index", build)
        per_query[name], strict = ranks(method, facts, pool, seconds)
        results[name] = {"seconds": seconds, "gold": figures(per_query[name]), "gold_strict": figures(strict)}
        print(name, json.dumps(results[name]), flush=True)
    if "embeddings" in per_query:
        against = compare(per_query["embeddings"].reciprocal_rank, per_query["BM25"].reciprocal_rank)
        difference = against.difference
        results["embeddings - BM25, MRR"] = {
            "difference": [round(value, 4) for value in (difference.mean, difference.low, difference.high)],
            "p": against.p_value,
        }
    pairs = zip(pool.example_ids, pool.texts, strict=True)
    examples = [Example(example_id=name, text=text, record=row) for row, (name, text) in enumerate(pairs)]
    frequencies = timed(reading, "count facts", lambda: fact_frequencies(facts, examples))
    buckets = [frequency_bucket(int(frequency)) for frequency in frequencies]
    report = {
        "candidates": len(pool),
        "queries": len(facts),
        "query_file": arguments.queries,
        "threads": torch.get_num_threads(),
        "seconds": reading,
        "facts_by_frequency_bucket": {str(bucket): buckets.count(bucket) for bucket in sorted(set(buckets))},
        "methods": results,
    }
    if arguments.limit is None:
        save(f"baselines-{arguments.trex.name}-{Path(arguments.queries).stem.replace('_', '-')}-cpu", report)
    else:
        print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
