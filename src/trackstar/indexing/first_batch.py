"""A first gradient batch of the corpus, measured: time per token, and memory of a full batch."""

import dataclasses
import time
from collections.abc import Callable, Sequence

import torch

from trackstar.corpus import TokenizedExample
from trackstar.errors import TrackstarError
from trackstar.gradients.per_example import logits_chunk_bytes
from trackstar.gradients.projector import GradientProjector, projected
from trackstar.gradients.second_moment import NO_SECOND_MOMENT
from trackstar.indexing import costs
from trackstar.indexing.machine import MemoryPeak
from trackstar.indexing.settings import ChosenSettings
from trackstar.model.batching import plan_batches
from trackstar.model.language_model import LanguageModel

_FEW_OPERATIONS = 5e10
"""Work of fewer operations takes seconds and is not measured."""
_SHARE, _LEAST_SECONDS = 0.02, 1.0
"""Most time of the measurement: this share of the work, or these seconds if that is more."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Operations and bytes per second of this machine.

    Attributes:
        single: Of matrix products in float32.
        double: Of matrix products in float64.
        moved: Bytes that are read and written.
    """

    single: float
    double: float
    moved: float

    def seconds(self, work: costs.Operations) -> float:
        """Time of some work."""
        return work.single / self.single + work.double / self.double + work.moved / self.moved


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FirstBatch:
    """What was measured of a first batch.

    Attributes:
        examples: Number of its examples.
        tokens: Number of their tokens.
        seconds: Its time.
        growth: Bytes of memory that it took, beside projections.
        rates: The machine's rates.
    """

    examples: int
    tokens: int
    seconds: float
    growth: int
    rates: Rates

    @property
    def tokens_per_second(self) -> float:
        """Tokens whose φ is computed in a second."""
        return self.tokens / self.seconds


def first_batch(
    model: LanguageModel, settings: ChosenSettings, windows: Sequence[TokenizedExample], tokens: float
) -> FirstBatch | None:
    """Measure a batch of the corpus, or as much of one as costs little; None if the work is too small for it.

    Nothing is measured of one-sided projections either, and nothing if the batch cannot be computed: the
    work itself then says why.

    Args:
        model: The model.
        settings: What the index is asked to be.
        windows: Some examples of the corpus.
        tokens: Number of tokens whose gradients the work computes.
    """
    small = 4 * sum(p.numel() for p in model.module.parameters()) * tokens < _FEW_OPERATIONS
    if small or settings.projection == "one-sided" or not windows:
        return None
    lengths = [len(window.token_ids) for window in windows]
    batches = plan_batches(lengths, model.batch_budget(settings.batch_tokens))
    batch = [windows[index] for index in batches[(len(batches) - 1) // 2]]
    try:
        return _measured(model, settings, batch, tokens)
    except TrackstarError:
        return None


def _measured(
    model: LanguageModel, settings: ChosenSettings, batch: Sequence[TokenizedExample], tokens: float
) -> FirstBatch:
    with GradientProjector(
        model, NO_SECOND_MOMENT, seed=settings.seed, side=settings.side, batch_tokens=settings.batch_tokens,
        note=lambda _line: None, output=settings.output,
    ) as projector:  # fmt: skip
        seconds, growth = _run(projector, batch[:1])  # the first pass of a process is slower than others
        budget = max(_LEAST_SECONDS, _SHARE * seconds * tokens / len(batch[0].token_ids))
        part = batch[: max(1, min(len(batch), int(budget / seconds)))]
        if len(part) > 1 or seconds <= budget:
            seconds, growth = _run(projector, part)
    return FirstBatch(
        examples=len(part),
        tokens=sum(len(example.token_ids) for example in part),
        seconds=seconds,
        growth=growth,
        rates=measured_rates(model.device),
    )


def _run(projector: GradientProjector, batch: Sequence[TokenizedExample]) -> tuple[float, int]:
    """Seconds of a batch, and the bytes of memory that it takes."""
    with MemoryPeak(projector.device) as peak:
        begun = time.perf_counter()
        projected(projector, batch)
        seconds = time.perf_counter() - begun
    return max(seconds, 1e-6), peak.most - peak.before


def measured_rates(device: torch.device) -> Rates:
    """The machine's rates, from a few products of small matrices."""
    one = torch.ones(512, 1024, device=device)
    other = torch.ones(1024, 1024, device=device)
    single = _rate(lambda: one @ other, 2 * 512 * 1024 * 1024, device)
    square = torch.ones(512, 512, dtype=torch.float64)
    double = _rate(lambda: square @ square, 2 * 512**3, torch.device("cpu"))
    block = torch.ones(4 << 20)
    moved = _rate(lambda: block.add_(1.0), 2 * 4 * block.numel(), torch.device("cpu"))
    return Rates(single=single, double=double, moved=moved)


def _rate(run: Callable[[], object], amount: int, device: torch.device) -> float:
    best = float("inf")
    for _ in range(3):
        begun = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begun)
    return amount / max(best, 1e-9)


def batch_bytes(
    model: LanguageModel, settings: ChosenSettings, size_tokens: int, longest: int, batch: FirstBatch | None
) -> int:
    """Bytes of memory that the graph and the logits of a full batch take.

    What was measured of a part of a batch grows with its tokens, all but the logits, which are computed for
    a chunk of tokens at a time.

    Args:
        model: The model.
        settings: What the index is asked to be.
        size_tokens: Number of tokens of the corpus.
        longest: Number of tokens of the longest example.
        batch: What was measured; None if nothing was.
    """
    budget = model.batch_budget(settings.batch_tokens)
    tokens = max(longest, min(budget, size_tokens))
    chunk, vocabulary = logits_chunk_bytes(model.device), model.vocabulary
    logits = costs.logits_bytes(tokens, vocabulary, chunk)
    activations = costs.activation_bytes(model.matrices, tokens, model.dtype.itemsize)
    if batch is None:
        return logits + 2 * activations
    without = batch.growth - costs.logits_bytes(batch.tokens, vocabulary, chunk)
    return logits + max(activations, round(without * max(1.0, tokens / batch.tokens)))
