"""How often re-ranking misses one of the true first ten, against the estimated chance; and MRR and tail-patch after it.

    python benchmarks/reranking.py --work FOLDER --data sentences.jsonl --facts queries.jsonl --model M [--pairs 40]

FOLDER is as benchmarks/layer_gradients.py leaves it.

Gradients have the 65,536 dimensions of the paper and are whitened by R_train. The exact ranking is that of float32. For
low-bit codecs and several N, over all queries: the mean estimated chance of a miss
(`trackstar.retrieval.reranking.missed_chance`), the rate of misses, both again for estimates below and above one half,
the overlap of the first ten, and MRR over gold sentences. For the first `--pairs` queries: the mean tail-patch of the
first ten (0 skips it). A query's final ranking is the store's best N in the order of their exact influences, followed
by the others in the store's order. Lines without re-ranking are the store's own ranking; those of float32 are the exact
one.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from measurement import save
from stores import PAPER, Layout, cut, gold_rows, scores_of, tail_patch_effects, task_mixing, whitened
from trackstar.choices import CodecName
from trackstar.curvature.autocorrelation import autocorrelation
from trackstar.curvature.low_rank import TaskWhitening
from trackstar.curvature.whitening import shrinkage_damping, whitening
from trackstar.evaluation.metrics import gold_ranks
from trackstar.retrieval.reranking import missed_chance
from trackstar.store import encode

COUNTS = (20, 50, 100, 200, 500, 1000)
CODECS: tuple[CodecName, ...] = ("float32", "int8", "4-bit", "2-bit", "1-bit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("work", "data", "facts", "model"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--pairs", type=int, default=40, help="queries whose tail-patch is measured; 0 for none")
    options = parser.parse_args()
    work = Path(options.work)
    layers = max(layer for _, _, layer in json.loads((work / "layout.json").read_text())["blocks"]) + 1
    layout = Layout(8, 64)
    assert layout.dimensions == PAPER
    candidates, queries = (cut(work / f"{name}.npy", layout, layers) for name in ("candidates", "queries"))
    gold = gold_rows(options.data, options.facts)
    r_train = autocorrelation(candidates, layout.blocks)
    mixing = task_mixing(work, layout, r_train, queries)
    train = whitening(r_train, damping=shrinkage_damping(r_train, len(candidates)), rotation=0)
    rows, asked = whitened(train.apply, candidates), train.apply(queries)
    lines: list[dict[str, Any]] = []
    first_ten: dict[int, list[list[int]]] = {}
    for value in (mixing, 0.0):
        task = TaskWhitening.of(asked, blocks=layout.blocks, mixing=value)
        exact = scores_of(task, asked, rows, task.norms(rows))
        for codec in CODECS:
            coarse = torch.empty_like(exact)
            for first in range(0, len(rows), 250):
                part = slice(first, first + 250)
                stored = encode(rows[part], codec, layout.blocks)
                coarse[:, part] = scores_of(task, asked, stored.decode(), task.stored_norms(stored))
            for count in (0,) if codec == "float32" else (0, *COUNTS):
                ranked = _ranked_again(exact, coarse, count)
                line = {"codec": codec, "lambda": round(value, 4), "reranked": count, **_gold(ranked, gold)}
                if count:
                    line |= _line(exact, coarse, count)
                if value == mixing:
                    first_ten[len(lines)] = ranked.topk(10, dim=1).indices[: options.pairs].tolist()
                print(line, flush=True)
                lines.append(line)
    if options.pairs:
        for number, effect in tail_patch_effects(options, first_ten).items():
            lines[number]["tail_patch@10"] = effect
    save(
        "reranking-cpu",
        {"candidates": len(rows), "queries": len(asked), "tail_patch_queries": options.pairs, "lines": lines},
    )


def _ranked_again(exact: Tensor, coarse: Tensor, count: int) -> Tensor:
    """Scores whose order is the final ranking, [queries, candidates] in float64: the best `count` by `exact`, above all
    others.
    """
    result = coarse.double()
    if count:
        best = coarse.topk(count, dim=1).indices
        chosen = exact.double().gather(1, best)
        result.scatter_(1, best, chosen - exact.min() + coarse.max() + 1)
    return result


def _gold(scores: Tensor, gold: Sequence[Sequence[int]]) -> dict[str, float]:
    first = [ranks[0] for ranks in gold_ranks(scores, gold) if ranks]
    return {
        "mrr": round(sum(1 / rank for rank in first) / len(first), 5),
        "recall@10": round(sum(rank <= 10 for rank in first) / len(first), 5),
    }


def _line(exact: Tensor, coarse: Tensor, count: int) -> dict[str, float | None]:
    chances, missed, overlap = [], [], 0.0
    for e, c in zip(exact, coarse, strict=True):
        order = c.sort(descending=True).indices
        best = e[order[:count]]
        threshold = float(best.topk(10).values[-1])
        chance = missed_chance(c[order[:count]], best, c[order[count:]], threshold=threshold)
        assert chance is not None
        chances.append(chance)
        missed.append(float(e.topk(10).values[-1] > threshold))
        overlap += len(set(e.topk(10).indices.tolist()) & set(order[:count].tolist())) / 10 / len(exact)
    chance, happened = torch.tensor(chances), torch.tensor(missed)
    found = {"estimated": float(chance.mean()), "happened": float(happened.mean())}
    for name, part in (("below one half", chance < 0.5), ("from one half on", chance >= 0.5)):
        found[f"queries {name}"] = float(part.float().mean())
        if part.any():
            found[f"estimated {name}"] = float(chance[part].mean())
            found[f"happened {name}"] = float(happened[part].mean())
    return {name: round(value, 4) for name, value in (found | {"overlap@10": overlap}).items()}


if __name__ == "__main__":
    main()
