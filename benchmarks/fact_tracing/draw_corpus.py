"""Draw a training set of T-REx sentences and statements of other facts, which is then the pool of candidates.

    python benchmarks/fact_tracing/draw_corpus.py trex 3500 1500 corpus.jsonl

Of the sentences those that are known to concern the queries are kept: gold ones, and those neither right nor wrong
(`coref`, `maybe_gold`). The rest is drawn at random with seed 0. Statements are facts in the words of the prompts
(`no_colon`), as many of each relation as there are: from them a small model learns what a prompt asks for. None is
about the subject of a query, so that the queries' own facts stand in sentences alone.
"""

import gzip
import json
import random
import sys
from pathlib import Path
from typing import Any

SEED = 0


def draw_corpus(trex: Path, sentences: int, statements: int, out: Path) -> None:
    """Write sentences and statements, shuffled, from the folder of the T-REx set."""
    queries = read_lines(trex / "queries.jsonl") + read_lines(trex / "queries_hard.jsonl")
    drawn = drawn_sentences(trex, queries, sentences) + drawn_statements(trex, queries, statements)
    random.Random(SEED).shuffle(drawn)
    out.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in drawn), encoding="utf-8")


def drawn_sentences(trex: Path, queries: list[dict[str, Any]], count: int) -> list[dict[str, str]]:
    asked = {query["fact_id"] for query in read_lines(trex / "queries.jsonl")}
    known = {
        name for q in queries if q["fact_id"] in asked for field in ("gold", "coref", "maybe_gold") for name in q[field]
    }
    if len(known) > count:
        raise SystemExit(f"{count} sentences asked for; the queries' own are {len(known)}, ask for at least as many")
    everything = read_lines(trex / "sentences.jsonl.gz")
    others = sorted(sentence["sentence_id"] for sentence in everything if sentence["sentence_id"] not in known)
    chosen = known | set(random.Random(SEED).sample(others, count - len(known)))
    return [
        {"sentence_id": one["sentence_id"], "text": one["text"]} for one in everything if one["sentence_id"] in chosen
    ]


def drawn_statements(trex: Path, queries: list[dict[str, Any]], count: int) -> list[dict[str, str]]:
    subjects = {name for query in queries for name in (query["subject_id"], query["subject"])}
    templates = {one["relation_id"]: one["no_colon"] for one in read_lines(trex / "templates.jsonl")}
    by_relation: dict[str, list[dict[str, Any]]] = {name: [] for name in sorted(templates)}
    for fact in read_lines(trex / "facts.jsonl.gz"):
        if not {fact["subject_id"], fact["subject"]} & subjects and not fact["answer_in_subject"]:
            by_relation[fact["relation_id"]].append(fact)
    for facts in by_relation.values():
        random.Random(SEED).shuffle(facts)
    drawn: list[dict[str, str]] = []
    while len(drawn) < count and any(by_relation.values()):
        for relation, facts in by_relation.items():
            if facts and len(drawn) < count:
                fact = facts.pop()
                text = f"{templates[relation].replace('[X]', fact['subject'])} {fact['object']}."
                drawn.append({"sentence_id": f"statement {fact['fact_id']}", "text": text})
    return drawn


def read_lines(path: Path) -> list[dict[str, Any]]:
    """A file of JSON lines, plain or gzipped."""
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
    return [json.loads(line) for line in text.splitlines()]


if __name__ == "__main__":
    draw_corpus(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
