"""From corpus to index: tokenize, take gradients, project, store, sum R_train; shard after shard, resumable."""

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float32
from torch import Tensor

from trackstar.batching import Batch, make_batch, plan_batches, run_adaptively
from trackstar.curvature import Autocorrelation, Whitening
from trackstar.errors import CorpusError, DamagedIndexError, GradientError
from trackstar.examples import Corpus, Example, TokenizedExample, tokenize_examples
from trackstar.flattened_projection import FlattenedGradients
from trackstar.gradients import Output, gradient_pass
from trackstar.model import LanguageModel
from trackstar.optimizer_state import find_optimizer_state, second_moment_from_state
from trackstar.projection import ProjectedGradients
from trackstar.second_moment import (
    NO_SECOND_MOMENT,
    SecondMoment,
    checked_second_moment,
    estimate_second_moment,
)
from trackstar.store import (
    CodecName,
    Index,
    IndexTensors,
    IndexWriter,
    Manifest,
    ProjectionKind,
    Shard,
    ShardContent,
    StoredRows,
    WindowsEntry,
    encode,
    load_manifest,
)

# How often, in seconds, the sums of R_train are put aside, so that a resumed run need not add up all shards again.
_SAVE_PROGRESS_EVERY = 600.0
# Rows added to R_train at once: each shard is cut at the same rows whether it has just been made or is read again, so
# that a resumed run's sums are those of an undisturbed one, bit for bit.
_ROWS_AT_ONCE = 512


class GradientProjector:
    """From tokenized examples to φ = P(∇Loss/√V) and losses, in batches of similar length.

    Hooks stay on the model until it is closed; use it as a context manager.

    Args:
        model: The model.
        second_moment: V.
        seed: Of the projections.
        side: Rows and columns of a block of φ.
        batch_tokens: Most tokens of a batch, padding included.
        note: Told when memory runs out and batches are made smaller.
        output: What is differentiated.
        kind: Whether P is two-sided, or dense for flattened gradients.
    """

    def __init__(
        self,
        model: LanguageModel,
        second_moment: SecondMoment,
        *,
        seed: int,
        side: int,
        batch_tokens: int,
        note: Callable[[str], None],
        output: Output = "loss",
        kind: ProjectionKind = "two-sided",
    ) -> None:
        self._model = model
        self._output: Output = output
        projected = ProjectedGradients if kind == "two-sided" else FlattenedGradients
        self._projected = projected(model, second_moment, seed=seed, side=side)
        self._batch_tokens = batch_tokens
        self._note = note
        self._stack = ExitStack()
        self._pass: Callable[[Batch], Tensor] | None = None

    def __enter__(self) -> "GradientProjector":
        self._pass = self._stack.enter_context(gradient_pass(self._model, self._projected, output=self._output))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def dimensions(self) -> int:
        """Dimensions of φ."""
        return self._projected.dimensions

    def batches(self, examples: Sequence[TokenizedExample]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Places of a batch's examples, their φ in float32 and their losses in nats, on the model's device.

        Raises:
            GradientError: A loss or gradient is not finite; the message names the example.
        """
        assert self._pass is not None, "used outside its context"
        run = self._pass

        def run_batch(places: list[int]) -> tuple[Tensor, Tensor]:
            losses = run(make_batch(examples, places, device=self._model.device))
            return self._projected.result(), losses

        plan = plan_batches([len(example.token_ids) for example in examples], self._batch_tokens)
        for places, (phi, losses) in run_adaptively(plan, run_batch, self._note):
            finite = torch.isfinite(phi).all(dim=1) & torch.isfinite(losses)
            if not finite.all():
                worst = examples[places[int(finite.int().argmin())]]
                raise GradientError(
                    f"{worst.example_id}: its loss or gradient is not finite, expected numbers; check the model's "
                    "weights and V, or leave the example out"
                )
            yield places, phi, losses


def projector_of(
    manifest: Manifest,
    model: LanguageModel,
    second_moment: SecondMoment,
    *,
    batch_tokens: int,
    note: Callable[[str], None] = lambda note: None,
) -> GradientProjector:
    """Gives φ as an index with this manifest keeps it; V is the manifest's."""
    return GradientProjector(
        model,
        second_moment,
        seed=manifest.projection.seed,
        side=manifest.projection.side,
        batch_tokens=batch_tokens,
        note=note,
        output=manifest.output,
        kind=manifest.projection.kind,
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CorpusPosition:
    """Where reading stands: the record and window that come next, and how many records had nothing to score."""

    record: int
    window: int
    skipped: int


@runtime_checkable
class ExampleSource(Protocol):
    """What an index is made of: examples in the order of their records."""

    @property
    def name(self) -> str:
        """What errors call it."""
        ...

    def examples(self, start: int = 0) -> Iterator[Example]:
        """The examples of record `start` and later."""
        ...


def tokenized_windows(
    corpus: ExampleSource, model: LanguageModel, start: CorpusPosition, *, window_tokens: int, overlap: int
) -> Iterator[tuple[TokenizedExample | None, CorpusPosition]]:
    """Windows in the corpus's order from `start` on, each with the position after it; None for a record without any."""
    skipped = start.skipped
    # Examples are needed twice: for their windows and, where there are none, for their place.
    first, second = itertools.tee(corpus.examples(start.record))
    tokenized = tokenize_examples(first, model.tokenizer, window_tokens=window_tokens, overlap=overlap)
    for example, windows in zip(second, tokenized, strict=True):
        if not windows:
            skipped += 1
            yield None, CorpusPosition(record=example.record + 1, window=0, skipped=skipped)
        for number, window in enumerate(windows):
            if example.record == start.record and number < start.window:
                continue
            last = number + 1 == len(windows)
            after = (example.record + 1, 0) if last else (example.record, number + 1)
            yield window, CorpusPosition(record=after[0], window=after[1], skipped=skipped)


class RowMaker:
    """From tokenized examples to stored rows: φ, in whitened coordinates u = W_train φ, and encoded.

    Args:
        projector: Gives φ.
        manifest: Whose codec encodes it.
        train: W_train; None for projected coordinates.
        known: An index in projected coordinates that has some of the examples' φ already.
    """

    def __init__(
        self,
        projector: GradientProjector,
        manifest: Manifest,
        train: Whitening | None = None,
        known: Index | None = None,
    ) -> None:
        self._projector = projector
        self._codec: CodecName = manifest.codec
        self._blocks = len(manifest.layer_blocks)
        self._train = train
        self._known = known
        self._rows_known: dict[tuple[int, int], int] = {}
        for shard in known.shards if known is not None else ():
            places = zip(shard.records.tolist(), shard.windows.tolist(), strict=True)
            self._rows_known |= {place: shard.first_row + row for row, place in enumerate(places)}

    def rows(
        self, examples: Sequence[TokenizedExample], advance: Callable[[int], None] = lambda _examples: None
    ) -> tuple[StoredRows, Float32[Tensor, "rows"]]:
        """Rows of the examples, in their order, and their losses in nats.

        Args:
            examples: At least one.
            advance: Told how many documents have been done.
        """
        # Whitening reads a W_train of the size of R_train: many rows at once.
        at_once = len(examples) if self._train is None else _ROWS_AT_ONCE
        parts = [self._part(examples[first : first + at_once], advance) for first in range(0, len(examples), at_once)]
        return StoredRows.joined([part for part, _ in parts]), torch.cat([losses for _, losses in parts])

    def _part(
        self, examples: Sequence[TokenizedExample], advance: Callable[[int], None]
    ) -> tuple[StoredRows, Float32[Tensor, "rows"]]:
        losses = torch.empty(len(examples))
        stored = StoredRows.empty(self._codec, len(examples), self._projector.dimensions, self._blocks)
        phi = torch.empty(len(examples), self._projector.dimensions) if self._train is not None else None
        places = [(example.record, example.window) for example in examples]
        missing = [place for place, key in enumerate(places) if key not in self._rows_known]
        if phi is not None and len(missing) < len(examples):
            assert self._known is not None, "rows are known of an index"
            there = [place for place, key in enumerate(places) if key in self._rows_known]
            rows = [self._rows_known[places[place]] for place in there]
            phi[there] = self._known.some_rows(rows).decode()
            losses[there] = self._known.some_losses(rows)
            advance(sum(examples[place].window == 0 for place in there))
        for batch, batch_phi, batch_losses in self._projector.batches([examples[place] for place in missing]):
            rows = torch.tensor([missing[place] for place in batch])
            if phi is None:
                stored[rows] = encode(batch_phi, self._codec, self._blocks).to("cpu")
            else:
                phi[rows] = batch_phi.cpu()
            losses[rows] = batch_losses.cpu()
            advance(sum(examples[missing[place]].window == 0 for place in batch))
        if phi is not None and self._train is not None:
            device = self._train.factors.device
            stored = encode(self._train.apply(phi.to(device)), self._codec, self._blocks).to("cpu")
        return stored, losses


def write_shards(
    writer: IndexWriter,
    corpus: ExampleSource,
    model: LanguageModel,
    maker: RowMaker,
    *,
    advance: Callable[[int], None],
) -> CorpusPosition:
    """Write every shard that is still missing.

    Args:
        writer: The open index.
        corpus: Where the examples come from.
        model: Whose tokenizer splits them.
        maker: Makes rows of examples.
        advance: Told how many examples have been done, documents counted once.

    Returns:
        The position at the corpus's end.

    Raises:
        CorpusError: No record of the corpus has a token to score.
    """
    manifest = writer.manifest
    resume = writer.resume_point
    start = CorpusPosition(record=resume.record, window=resume.window, skipped=resume.skipped)
    windows = tokenized_windows(
        corpus, model, start, window_tokens=manifest.windows.tokens, overlap=manifest.windows.overlap
    )
    projected = manifest.coordinates == "projected"
    r_train = RunningAutocorrelation(writer, device=model.device) if projected else None

    def write(at: CorpusPosition) -> None:
        shard = write_shard(writer, held, at, maker, advance)
        if r_train is not None:
            r_train.add(shard)

    at = start
    held: list[TokenizedExample] = []
    position = start
    for window, position in windows:
        if window is None:
            continue
        held.append(window)
        at = position
        if len(held) == manifest.shard_examples:
            write(at)
            held = []
    if held:
        # Records without a token to score that end the corpus belong to no shard; `finish` counts them.
        write(at)
    if not writer.shards_done:
        raise CorpusError(
            f"{corpus.name}: none of its {position.record} records has a token to score, expected texts of two tokens "
            "or more"
        )
    if r_train is not None:
        writer.write_tensors("autocorrelation", {"autocorrelation": r_train.mean()})
    return position


def write_shard(
    writer: IndexWriter,
    examples: Sequence[TokenizedExample],
    after: CorpusPosition,
    maker: RowMaker,
    advance: Callable[[int], None] = lambda _examples: None,
) -> Shard:
    """Write one shard: φ of the examples, encoded, with what is needed to show and recompute them.

    Args:
        writer: The open index.
        examples: The shard's examples, in the order of its rows.
        after: Where the next shard begins.
        maker: Makes rows of examples.
        advance: Told how many documents have been done.
    """
    stored, losses = maker.rows(examples, advance)
    content = ShardContent(
        stored=stored,
        losses=losses,
        examples=examples,
        next_record=after.record,
        next_window=after.window,
        skipped=after.skipped,
    )
    return writer.write_shard(content)


class RunningAutocorrelation:
    """R_train over the shards as stored, so that it is a function of the finished shards and nothing else.

    Args:
        writer: The open index.
        device: Where the sums are kept and added to: blocks × side⁴ × 4 bytes (1 GiB in the paper's setting).
    """

    def __init__(self, writer: IndexWriter, *, device: torch.device | str = "cpu") -> None:
        manifest = writer.manifest
        self._writer = writer
        blocks = len(manifest.layer_blocks)
        self._sums = Autocorrelation(blocks, manifest.projection.side**2, device=device)
        counted, kept = writer.load_progress()
        if counted:
            self._sums.sums.copy_(kept["sums"])
            self._sums.examples = sum(shard.rows for shard in writer.shards_done[:counted])
        self._saved = time.monotonic()
        for shard in writer.shards_done[counted:]:
            self._add_rows(shard)

    def add(self, shard: Shard) -> None:
        """Add a shard that has just been written; now and then put the sums aside."""
        self._add_rows(shard)
        if time.monotonic() - self._saved > _SAVE_PROGRESS_EVERY:
            self._writer.save_progress({"sums": self._sums.sums.cpu()})
            self._saved = time.monotonic()

    def mean(self) -> Tensor:
        """R_train."""
        return self._sums.mean().cpu()

    def _add_rows(self, shard: Shard) -> None:
        stored = shard.stored
        for first in range(0, shard.rows, _ROWS_AT_ONCE):
            rows = slice(first, first + _ROWS_AT_ONCE)
            device = self._sums.sums.device
            self._sums.add(stored[rows].to(device).decode())


def chosen_second_moment(
    asked: str | Path | SecondMoment,
    model: LanguageModel,
    corpus: Corpus,
    windows: WindowsEntry,
    *,
    kind: Literal["factored", "elementwise"],
    examples: int,
    seed: int,
    batch_tokens: int,
    out: Path | None,
    note: Callable[[str], None],
) -> SecondMoment:
    """V as asked for: given, none, from optimizer state, or estimated; see `build_index`.

    An estimate that an interrupted run has already made for the same index is taken from there.
    """
    if isinstance(asked, SecondMoment):
        return checked_second_moment(asked, model.matrices)
    if str(asked) == "none":
        return NO_SECOND_MOMENT
    state = None
    if str(asked) == "auto":
        state = find_optimizer_state(model.folder) if model.folder is not None else None
    elif str(asked) != "estimate":
        state = Path(asked)
        state = (find_optimizer_state(state) or state) if state.is_dir() else state
    if state is not None:
        return checked_second_moment(second_moment_from_state(state, model, kind=kind), model.matrices)
    source = f"estimated from {examples} examples drawn with seed {seed}"
    begun = load_manifest(out) if out is not None else None
    same = begun is not None and begun.second_moment.source == source and begun.second_moment.kind == kind
    if out is not None and begun is not None and same:
        with contextlib.suppress(DamagedIndexError):  # it is estimated again
            kept = IndexTensors(out).read("second_moment", begun)
            return SecondMoment.from_tensors(kept, source=source, floor=begun.second_moment.floor)
    note(f"second moment: {'no optimizer state beside the model, so V is ' if asked == 'auto' else ''}{source}")
    sample = tokenize_examples(
        corpus.sample(examples, seed), model.tokenizer, window_tokens=windows.tokens, overlap=windows.overlap
    )
    # A long document's first window stands for it.
    chosen = [parts[0] for parts in sample if parts]
    if not chosen:
        raise CorpusError(
            f"{corpus.name}: none of {examples} records drawn from it has a token to score, expected texts of two "
            "tokens or more to estimate V from"
        )
    moment = estimate_second_moment(model, chosen, kind=kind, token_budget=batch_tokens, note=note)
    return checked_second_moment(dataclasses.replace(moment, source=source), model.matrices)
