"""Dimensions or precision: what a store's bytes buy, on real gradients; the frontier of layouts against bits.

    python benchmarks/layer_gradients.py ... --work FOLDER      once: φ with one block a layer and kind
    python benchmarks/stores.py --work FOLDER --data sentences.jsonl --facts queries.jsonl --model M [--pairs 40]

From φ with one block a layer, φ of every layout with fewer blocks or a smaller side is cut. Each is whitened by its own
R_train, coded with 32 to 1 bits a dimension, and asked with the task's λ and with λ = 0. It reports MRR and recall@10
over gold sentences, overlap of the first ten with the same layout's exact ranking, before and after ranking the best N
again, and for the first `--pairs` queries and stores up to 64 KB the mean tail-patch of the first ten. For the 65,536
dimensions of the paper
also: the same codes without whitening, and those of FAISS where it is installed.
"""

import argparse
import dataclasses
import gc
import importlib
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from measurement import save
from trackstar.choices import CODECS
from trackstar.corpus import open_corpus, tokenize_examples, tokenize_query
from trackstar.curvature.autocorrelation import autocorrelation
from trackstar.curvature.low_rank import TaskWhitening
from trackstar.curvature.mixing import mixing_by_spectra, spectrum_of_autocorrelation, spectrum_of_examples
from trackstar.curvature.whitening import shrinkage_damping, whitening
from trackstar.evaluation.fact_files import read_facts
from trackstar.evaluation.facts import to_queries
from trackstar.evaluation.metrics import gold_ranks
from trackstar.indexing.second_moment import second_moment_for
from trackstar.indexing.settings import IndexSettings
from trackstar.model.language_model import load_model
from trackstar.store import WindowsEntry, encode, row_bytes
from trackstar.tail_patch import Pair, TrainingStep, tail_patch

RERANKED = (20, 50, 100, 200, 500, 1000)
PAPER = 65_536
# Tail-patch is measured for the frontier, up to 64 KB an example, by the task's λ.
_MOST_BYTES = 66_000


@dataclasses.dataclass(frozen=True)
class Layout:
    """Layer blocks of a kind, and the side of each."""

    per_kind: int
    side: int

    @property
    def blocks(self) -> int:
        return 2 * self.per_kind

    @property
    def dimensions(self) -> int:
        return self.blocks * self.side**2


# Sides are multiples of 8, so that low-bit codes fill whole words; the last is one block a layer.
LAYOUTS = (
    Layout(4, 16), Layout(8, 16), Layout(4, 32), Layout(8, 32), Layout(4, 64), Layout(8, 64), Layout(16, 64),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("work", "data", "facts", "model"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--pairs", type=int, default=40, help="queries whose tail-patch is measured; 0 for none")
    parser.add_argument("--name", default="stores-cpu", help="of the file of results")
    parser.add_argument("--dimensions", type=int, help="only the layouts with so many")
    options = parser.parse_args()
    gold = gold_rows(options.data, options.facts)
    work = Path(options.work)
    layers = max(layer for _, _, layer in json.loads((work / "layout.json").read_text())["blocks"]) + 1
    lines: list[dict[str, object]] = []
    best: dict[int, list[list[int]]] = {}
    layouts = [one for one in (*LAYOUTS, Layout(layers, 64)) if options.dimensions in (None, one.dimensions)]
    for layout in layouts:
        for line, rows in _kept(work, layout, layers, gold):
            if line["lambda"] > 0 and line["coordinates"] == "whitened" and line["bytes"] <= _MOST_BYTES:
                best[len(lines)] = rows[: options.pairs]
            lines.append(line)
    if options.pairs:
        for number, effect in tail_patch_effects(options, best).items():
            lines[number]["tail_patch@10"] = effect
    save(
        options.name,
        {
            "candidates": len(np.load(work / "candidates.npy", mmap_mode="r")),
            "queries": len(gold),
            "tail_patch_queries": options.pairs,
            "model": options.model,
            "lines": lines,
        },
    )


def gold_rows(data: str, facts: str) -> list[list[int]]:
    """Each fact's gold sentences as rows of the corpus."""
    row_of = {example.example_id: row for row, example in enumerate(open_corpus(data).examples(0))}
    return [[row_of[name] for name in fact.gold if name in row_of] for fact in read_facts(facts)]


def _kept(
    work: Path, layout: Layout, layers: int, gold: Sequence[Sequence[int]]
) -> list[tuple[dict[str, Any], list[list[int]]]]:
    """A layout's lines and the first ten of each query, from an earlier run where it has them."""
    file = work / f"frontier-{layout.dimensions}.json"
    if not file.exists():
        found = []
        for line, scores in _layout_lines(work, layout, layers, gold):
            found.append((line, scores.topk(10, dim=1).indices.tolist()))
            print(json.dumps(line), flush=True)
        file.write_text(json.dumps(found), encoding="utf-8")
        gc.collect()
    return json.loads(file.read_text(encoding="utf-8"))


def task_mixing(work: Path, layout: Layout, r_train: Tensor, queries: Tensor) -> float:
    """λ by the paper's rule; beyond the paper's dimensions that of the paper's, whose spectra take minutes already."""
    dimensions = min(layout.dimensions, PAPER)
    file = work / f"mixing-{dimensions}.json"
    if not file.exists():
        mixing = mixing_by_spectra(
            spectrum_of_examples(queries, layout.blocks), spectrum_of_autocorrelation(r_train),
            dimensions=dimensions, queries=len(queries),
        )  # fmt: skip
        file.write_text(json.dumps(mixing.value), encoding="utf-8")
    return json.loads(file.read_text(encoding="utf-8"))


def _layout_lines(
    work: Path, layout: Layout, layers: int, gold: Sequence[Sequence[int]]
) -> Iterator[tuple[dict[str, object], Tensor]]:
    """Every codec of one layout, by the task's λ and by 0, and the scores that each gives."""
    candidates, queries = (cut(work / f"{name}.npy", layout, layers) for name in ("candidates", "queries"))
    r_train = autocorrelation(candidates, layout.blocks)
    damping = shrinkage_damping(r_train, len(candidates))
    mixing = task_mixing(work, layout, r_train, queries)
    train = whitening(r_train, damping=damping, rotation=0)
    del r_train
    rows, asked = whitened(train.apply, candidates), train.apply(queries)
    about: dict[str, object] = {
        "dimensions": layout.dimensions,
        "blocks": layout.blocks,
        "side": layout.side,
        "damping": damping,
    }
    if layout.dimensions == PAPER:
        # Codes of φ itself, which then meet W_train: the same score without whitening first.
        for line, scores in _coded(candidates, rows, layout, mixing, gold, train.apply, asked):
            yield about | {"coordinates": "projected"} | line, scores
    del candidates
    gc.collect()
    for line, scores in _coded(rows, rows, layout, mixing, gold, None, asked):
        yield about | {"coordinates": "whitened"} | line, scores
    if layout.dimensions == PAPER:
        for line, scores in _faiss(rows, asked, layout, mixing, gold):
            yield about | {"coordinates": "whitened"} | line, scores


def _coded(kept, rows, layout, mixing, gold, train, asked):
    """`kept` is what is coded, `rows` the same whitened; `train` whitens what has been decoded."""
    for codec in CODECS:
        if codec == "bfloat16":
            continue
        tasks = [TaskWhitening.of(asked, blocks=layout.blocks, mixing=value) for value in (mixing, 0.0)]
        exact, coarse = ([torch.empty(len(asked), len(rows)) for _ in tasks] for _ in range(2))
        for first in range(0, len(rows), 250):
            part = slice(first, first + 250)
            stored = encode(kept[part], codec, layout.blocks)
            decoded = stored.decode() if train is None else train(stored.decode())
            for number, task in enumerate(tasks):
                norms = task.norms(rows[part])
                exact[number][:, part] = scores_of(task, asked, rows[part], norms)
                if train is None:
                    norms = task.stored_norms(stored)
                coarse[number][:, part] = scores_of(task, asked, decoded, norms)
        for number, value in enumerate((mixing, 0.0)):
            line = {"codec": codec, "lambda": value, "bytes": row_bytes(codec, layout.dimensions, layout.blocks)}
            yield line | _agreement(exact[number], coarse[number], gold), coarse[number]


def _faiss(rows, asked, layout, mixing, gold):
    """FAISS's quantizers on the same whitened rows; norms under the task are exact."""
    try:
        faiss = importlib.import_module("faiss")  # an extra that only this table needs, and no checker sees
    except ImportError:
        return
    dimensions = layout.dimensions
    kinds = {
        "FAISS SQ8": lambda: faiss.ScalarQuantizer(dimensions, faiss.ScalarQuantizer.QT_8bit),
        "FAISS SQ4": lambda: faiss.ScalarQuantizer(dimensions, faiss.ScalarQuantizer.QT_4bit),
        "FAISS RaBitQ": lambda: faiss.RaBitQuantizer(dimensions, faiss.METRIC_INNER_PRODUCT),
    }
    content = rows.numpy()
    for name, make in kinds.items():
        quantizer = make()
        quantizer.train(content)
        decoded = torch.from_numpy(quantizer.decode(quantizer.compute_codes(content)))
        task = TaskWhitening.of(asked, blocks=layout.blocks, mixing=mixing)
        norms = task.norms(rows)
        exact, coarse = scores_of(task, asked, rows, norms), scores_of(task, asked, decoded, norms)
        line = {"codec": name, "lambda": mixing, "bytes": quantizer.code_size}
        yield line | _agreement(exact, coarse, gold), coarse


def scores_of(task: TaskWhitening, asked: Tensor, rows: Tensor, norms: Tensor) -> Tensor:
    vectors = task.apply_inverse(asked) / task.norms(asked)[:, None]
    return (vectors @ rows.T) / norms


def whitened(apply, rows: Tensor) -> Tensor:
    result = torch.empty_like(rows)
    for first in range(0, len(rows), 500):
        result[first : first + 500] = apply(rows[first : first + 500])
    return result


def cut(path: Path, layout: Layout, layers: int) -> Tensor:
    """φ of a layout: sums over each block's layers, the first rows and columns of each square."""
    whole = np.load(path, mmap_mode="r")
    side = round((whole.shape[1] // (2 * layers)) ** 0.5)
    bounds = [round(i * layers / layout.per_kind) for i in range(layout.per_kind + 1)]
    result = torch.empty(len(whole), layout.dimensions)
    for first in range(0, len(whole), 250):
        part = torch.from_numpy(np.array(whole[first : first + 250])).reshape(-1, 2, layers, side, side)
        part = part[..., : layout.side, : layout.side] * (side / layout.side)
        blocks = [part[:, :, start:stop].sum(dim=2) for start, stop in itertools.pairwise(bounds)]
        result[first : first + 250] = torch.stack(blocks, dim=2).flatten(1)
    return result


def _agreement(exact: Tensor, scores: Tensor, gold: Sequence[Sequence[int]]) -> dict[str, float]:
    best = exact.topk(10, dim=1).indices
    places = scores.argsort(dim=1, descending=True, stable=True)
    rank_of = torch.empty_like(places).scatter_(1, places, torch.arange(places.shape[1]).expand_as(places))
    ranks = rank_of.gather(1, best)
    found = {"overlap@10": float((ranks < 10).double().mean())}
    found |= {f"overlap@10 after {n} again": float((ranks < n).double().mean()) for n in RERANKED}
    for name, values in (("", scores), (" exact", exact)):
        gold_of = [ranks for ranks in gold_ranks(values, gold) if ranks]
        found[f"mrr{name}"] = float(np.mean([1 / ranks[0] for ranks in gold_of]))
        found[f"recall@10{name}"] = float(np.mean([ranks[0] <= 10 for ranks in gold_of]))
    return {name: round(value, 5) for name, value in found.items()}


def tail_patch_effects(options: argparse.Namespace, best: dict[int, list[list[int]]]) -> dict[int, float]:
    """Mean tail-patch of each line's first ten; a pair that several lines share is measured once."""
    model = load_model(options.model)
    corpus = open_corpus(options.data)
    windows = WindowsEntry(tokens=model.context_tokens, overlap=1)
    moment = second_moment_for(
        IndexSettings(second_moment="estimate"), model, corpus, windows, out=Path(options.work) / "none", note=print
    )
    step = TrainingStep.from_second_moment(moment, model, learning_rate=0.001, loss="sum")
    pairs = sorted({(q, int(row)) for rows in best.values() for q, part in enumerate(rows) for row in part})
    used = sorted({row for _, row in pairs})
    texts = list(tokenize_examples(corpus.examples(0), model.tokenizer, window_tokens=windows.tokens, overlap=1))
    queries = [
        tokenize_query(query, model.tokenizer, window_tokens=model.context_tokens)
        for query in to_queries(read_facts(options.facts)[: options.pairs], 0)
    ]
    place = {row: number for number, row in enumerate(used)}
    print(f"tail-patch: {len(pairs)} pairs of {len(used)} candidates", flush=True)
    result = tail_patch(
        model, step, queries, [texts[row][0] for row in used],
        [Pair(query=query, proponent=place[row]) for query, row in pairs], path="fast",
    )  # fmt: skip
    effect = dict(zip(pairs, (result.after - result.before).tolist(), strict=True))
    return {
        number: round(float(np.mean([effect[q, int(row)] for q, part in enumerate(rows) for row in part])), 6)
        for number, rows in best.items()
    }


if __name__ == "__main__":
    main()
