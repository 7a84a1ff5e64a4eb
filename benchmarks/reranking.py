"""How often one of the true first ten is missed after ranking N again, against the chance that is told with a ranking.

    python benchmarks/reranking.py --work FOLDER      FOLDER as benchmarks/layer_gradients.py leaves it

The 65,536 dimensions of the paper, whitened by R_train; the exact ranking is that of float32. For codecs of few bits
and several N, over all queries: the mean estimated chance (`trackstar.reranking.missed_chance`), how often it happened,
the same split at an estimate of one half, and the overlap of the first ten.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from measurement import save
from stores import PAPER, Layout, _cut, _mixing, _scores, _whitened
from trackstar.curvature import autocorrelation, shrinkage_damping, whitening
from trackstar.reranking import missed_chance
from trackstar.store import CodecName, encode
from trackstar.task_whitening import TaskWhitening

COUNTS = (20, 50, 100, 200, 500, 1000)
CODECS: tuple[CodecName, ...] = ("int8", "4-bit", "2-bit", "1-bit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", required=True)
    work = Path(parser.parse_args().work)
    layers = max(layer for _, _, layer in json.loads((work / "layout.json").read_text())["blocks"]) + 1
    layout = Layout(8, 64)
    assert layout.dimensions == PAPER
    candidates, queries = (_cut(work / f"{name}.npy", layout, layers) for name in ("candidates", "queries"))
    r_train = autocorrelation(candidates, layout.blocks)
    mixing = _mixing(work, layout, r_train, queries)
    train = whitening(r_train, damping=shrinkage_damping(r_train, len(candidates))).rotated(0)
    rows, asked = _whitened(train.apply, candidates), train.apply(queries)
    lines = []
    for value in (mixing, 0.0):
        task = TaskWhitening.of(asked, blocks=layout.blocks, mixing=value)
        exact = _scores(task, asked, rows, task.norms(rows))
        for codec in CODECS:
            coarse = torch.empty_like(exact)
            for first in range(0, len(rows), 250):
                part = slice(first, first + 250)
                stored = encode(rows[part], codec, layout.blocks)
                coarse[:, part] = _scores(task, asked, stored.decode(), task.stored_norms(stored))
            for count in COUNTS:
                line = {"codec": codec, "lambda": round(value, 4), "reranked": count, **_line(exact, coarse, count)}
                print(line, flush=True)
                lines.append(line)
    save("reranking-cpu", {"candidates": len(rows), "queries": len(asked), "lines": lines})


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
