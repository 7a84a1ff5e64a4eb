"""Bits a dimension against agreement with the exact ranking, on a real index: whitened by R_train, and not whitened.

python benchmarks/stores.py --index IDX --facts queries.jsonl [--model M] [--task-mixing]

Each candidate's coordinates are coded with 8, 4, 2 and 1 bits a dimension and one factor a layer block
(`trackstar.store.quantization`), and ranked with the query's side in float32. The exact ranking is that of the index's
own codes. Told are MRR over gold sentences, overlap of the first ten, and the overlap that would be left after ranking
the best N again exactly. Candidates' norms under R are exact (kept beside the codes) unless a line says otherwise.
"""

import argparse
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from measurement import save
from trackstar.correction import task_correction
from trackstar.curvature import shrinkage_damping
from trackstar.evaluation.facts import Fact, read_facts, to_queries
from trackstar.evaluation.metrics import gold_ranks
from trackstar.pipeline import query_gradients
from trackstar.provenance import model_of_index
from trackstar.store import Index, decode
from trackstar.store.quantization import Bits, dequantize, packed_bytes, quantize

RERANKED = (20, 50, 100, 200, 500, 1000)
BITS: tuple[Bits, ...] = (8, 4, 2, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--index", required=True)
    parser.add_argument("--facts", required=True)
    parser.add_argument("--model")
    parser.add_argument("--name", default="stores-cpu", help="of the file of results")
    options = parser.parse_args()
    index = Index.open(options.index)
    facts = read_facts(options.facts)
    phi, _ = query_gradients(index, model_of_index(index, options.model), to_queries(facts, 0), progress=False)
    blocks = len(index.manifest.layer_blocks)
    candidates = torch.cat([decode(chunk.codes, chunk.scales) for chunk in index.iterate(1024)])
    gold = gold_rows(index, facts)
    lines = []
    task = task_correction(index, phi)
    alone = task_correction(index, phi[:1], mixing=0.0)
    for mixing, correction in (("task's", task), ("0", alone)):
        # Q = R⁻¹φ_q, and the candidates' norms under R, as the exact ranking has them.
        whitener = alone.whitening
        vectors = correction.whitening.apply_inverse(phi)
        norms = correction.whitening.norms(candidates)
        exact = (vectors @ candidates.T) / norms
        for coordinates, u, q in (
            ("whitened by R_train", *whitened(index, candidates, vectors, whitener.factors)),
            ("as projected", candidates, vectors),
        ):
            for bits in BITS:
                codes, factors = quantize(u.reshape(len(u), blocks, -1), bits)
                scores = (q @ dequantize(codes, factors, bits).flatten(1).T) / norms
                line = {
                    "mixing": mixing,
                    "lambda": correction.mixing.value,
                    "coordinates": coordinates,
                    "bits": bits,
                    "bytes_an_example": packed_bytes(index.dimensions, bits) + 4 * blocks + 4,
                    **agreement(exact, scores, gold),
                }
                print(line, flush=True)
                lines.append(line)
    save(
        options.name,
        {
            "candidates": index.rows,
            "queries": len(facts),
            "dimensions": index.dimensions,
            "damping": shrinkage_damping(index.tensors("autocorrelation")["autocorrelation"], index.rows),
            "model": index.manifest.model.architecture,
            "lines": lines,
        },
    )


def whitened(index: Index, candidates: Tensor, vectors: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """u = Wφ of the candidates, and the query's side for them: vectorᵀφ = (W⁻ᵀ vector)ᵀ u."""
    blocks = len(factors)
    u, q = (x.reshape(len(x), blocks, -1).transpose(0, 1).contiguous() for x in (candidates, vectors))
    u = torch.bmm(u, factors.mT)
    q = torch.linalg.solve_triangular(factors.mT, q.mT, upper=True).mT
    return u.transpose(0, 1).flatten(1), q.transpose(0, 1).flatten(1)


def gold_rows(index: Index, facts: Sequence[Fact]) -> list[list[int]]:
    row_of = {stored.example.example_id: stored.row for stored in index.examples()}
    return [[row_of[name] for name in fact.gold if name in row_of] for fact in facts]


def agreement(exact: Tensor, scores: Tensor, gold: Sequence[Sequence[int]]) -> dict[str, float]:
    best = exact.topk(10, dim=1).indices
    places = scores.argsort(dim=1, descending=True, stable=True)
    rank_of = torch.empty_like(places).scatter_(1, places, torch.arange(places.shape[1]).expand_as(places))
    ranks = rank_of.gather(1, best)
    found = {"overlap@10": float((ranks < 10).double().mean())}
    found |= {f"overlap@10 after {n} again": float((ranks < n).double().mean()) for n in RERANKED}
    found |= {"mrr": mrr(scores, gold), "mrr exact": mrr(exact, gold)}
    return {name: round(value, 5) for name, value in found.items()}


def mrr(scores: Tensor, gold: Sequence[Sequence[int]]) -> float:
    return float(np.mean([1 / ranks[0] for ranks in gold_ranks(scores, gold) if ranks]))


if __name__ == "__main__":
    main()
