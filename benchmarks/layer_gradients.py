"""Projected gradients of a corpus and its queries with one block a layer and kind: every smaller layout is a sum of
them.

A layer block is the sum of its matrices' projected gradients, each with projections of its own, and projections of
several sides are nested. So φ with one 64×64 block for each layer's attention and each layer's MLP holds φ of every
layout with fewer blocks or a smaller side, and a whole frontier of dimensions costs one pass over the corpus.

    python benchmarks/layer_gradients.py --model M --data sentences.jsonl --facts queries.jsonl --work FOLDER

FOLDER gets `candidates.npy` and `queries.npy` (float32, memory-mapped, written batch by batch; a run that was
interrupted goes on) and `layout.json`.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap

from trackstar.corpus import TokenizedExample, open_corpus, tokenize_examples, tokenize_query
from trackstar.evaluation.fact_files import read_facts
from trackstar.evaluation.facts import to_queries
from trackstar.gradients.projector import GradientProjector
from trackstar.gradients.second_moment import SecondMoment
from trackstar.indexing.second_moment import second_moment_for
from trackstar.indexing.settings import IndexSettings
from trackstar.model.language_model import LanguageModel, load_model
from trackstar.progress import Progress
from trackstar.store import WindowsEntry

SIDE = 64
_AT_ONCE = 250


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "data", "facts", "work"):
        parser.add_argument(f"--{name}", required=True)
    options = parser.parse_args()
    work = Path(options.work)
    work.mkdir(parents=True, exist_ok=True)
    model = load_model(options.model, layer_blocks=_layers(options.model))
    corpus = open_corpus(options.data)
    windows = WindowsEntry(tokens=model.context_tokens, overlap=1)
    moment = second_moment_for(
        IndexSettings(second_moment="estimate"), model, corpus, windows, out=work / "none", note=print
    )
    layout = [(block.name, block.kind, block.first_layer) for block in model.blocks]
    (work / "layout.json").write_text(json.dumps({"side": SIDE, "blocks": layout}), encoding="utf-8")
    queries = [
        tokenize_query(query, model.tokenizer, window_tokens=model.context_tokens)
        for query in to_queries(read_facts(options.facts), 0)
    ]
    project(work / "queries.npy", model, moment, queries)
    texts = tokenize_examples(corpus.examples(0), model.tokenizer, window_tokens=windows.tokens, overlap=1)
    project(work / "candidates.npy", model, moment, [parts[0] for parts in texts if parts])


def _layers(source: str) -> int:
    """As many blocks of a kind as the model has layers."""
    return max(block.last_layer for block in load_model(source).blocks) + 1


def project(path: Path, model: LanguageModel, moment: SecondMoment, examples: Sequence[TokenizedExample]) -> None:
    """φ of examples, row by row; `path.done` says how many are there."""
    dimensions = len(model.blocks) * SIDE**2
    said = path.with_suffix(".done")
    done = int(said.read_text()) if said.exists() else 0
    if not done:
        open_memmap(path, mode="w+", dtype=np.float32, shape=(len(examples), dimensions))
    rows = np.load(path, mmap_mode="r+")
    with (
        Progress(path.stem, unit="examples", total=len(examples)) as bar,
        GradientProjector(model, moment, seed=0, side=SIDE, batch_tokens=2048, note=print) as projector,
    ):
        bar.advance(done)
        for first in range(done, len(examples), _AT_ONCE):
            part = examples[first : first + _AT_ONCE]
            for places, phi, _ in projector.batches(part):
                rows[first + torch.tensor(places).numpy()] = phi.numpy()
                bar.advance(len(places))
            rows.flush()
            said.write_text(str(first + len(part)))
            print(f"{path.stem}: {first + len(part)} of {len(examples)}", flush=True)


if __name__ == "__main__":
    main()
