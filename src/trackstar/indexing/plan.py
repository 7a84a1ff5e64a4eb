"""The plan of an index: what is computed, how long it takes, and what memory and disk it needs.

The numbers come from the corpus (counted, or extrapolated from a sample), from a measured first batch, and
from `costs.py`. `benchmarks/plan.py` compares plans with what they foretell.
"""

import contextlib
import dataclasses
from pathlib import Path

from trackstar.corpus import Corpus, open_corpus
from trackstar.errors import OptionError, TrackstarError
from trackstar.indexing import costs
from trackstar.indexing.array_tasks import Share
from trackstar.indexing.corpus_size import CorpusSize, corpus_size
from trackstar.indexing.defaults import chosen_settings, is_begun, smaller_sides
from trackstar.indexing.first_batch import FirstBatch, batch_bytes, first_batch
from trackstar.indexing.machine import free_disk
from trackstar.indexing.needs import (
    Needs,
    Stage,
    longest,
    made_stage,
    memory_in_use,
    second_moment_stage,
    second_moment_tokens,
)
from trackstar.indexing.provenance import default_shard_examples, windows_entry
from trackstar.indexing.second_moment import planned_second_moment
from trackstar.indexing.settings import ChosenSettings, IndexSettings
from trackstar.model.language_model import LanguageModel, load_model
from trackstar.store import PART_FOLDER, Index, Place, as_folder, refuse_foreign_folder, row_bytes
from trackstar.text import amount_of_bytes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """What exists of an index.

    Attributes:
        examples: Number of examples in its shards.
        sampled: Number of examples of its first pass.
        whitened: Whether W_train is written.
        complete: Whether it is finished.
    """

    examples: int = 0
    sampled: int = 0
    whitened: bool = False
    complete: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class IndexPlan:
    """What an index costs; `str(plan)` is what the command line prints.

    Attributes:
        out: Folder or URL of the index.
        model: The model, in words.
        corpus: Size of the corpus.
        blocks: Number of layer blocks.
        settings: What the index is asked to be, with what was left to choose.
        defaults: Why the side and the codec were chosen, in words; none if they were given.
        second_moment: V's source, in words.
        sample: Number of examples that R_train is computed from.
        begun: What exists of the index.
        share: The part that is made; None is all of it.
        needs: The stages of the work that is left, with memory and time.
        stored: Bytes of the finished index.
        temporary: Bytes that it needs besides until it is finished.
        written: Bytes of them that are on disk already.
        free: Free bytes of the disk; None if they are not known, as of another file system's.
    """

    out: str
    model: str
    corpus: CorpusSize
    blocks: int
    settings: ChosenSettings
    defaults: tuple[str, ...]
    second_moment: str
    sample: int
    begun: Begun
    share: Share | None
    needs: Needs
    stored: int
    temporary: int
    written: int
    free: int | None

    @property
    def dimensions(self) -> int:
        """Dimensions of a row."""
        return self.blocks * self.settings.side**2

    def lines(self) -> tuple[str, ...]:
        """The plan, a line for each subject."""
        if self.begun.complete:
            return (f"plan: {self.out} is complete, with {self.begun.examples:,} examples; nothing is left to do",)
        return (
            f"plan: index {self.corpus.records:,} records for {self.model} at {self.out}",
            f"  corpus: {self.corpus}",
            f"  rows: {self._rows()}",
            *(f"  default: {why}" for why in self.defaults),
            f"  V: {self.second_moment}",
            f"  R_train: {self._r_train()}",
            f"  memory: {self.needs.memory_in_words()}",
            f"  disk: {self._disk()}",
            f"  time: {self._time()}",
        )

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def check(self) -> None:
        """Raise if memory or disk do not suffice for the work that is left.

        Raises:
            OptionError: They do not; the message names the numbers and the parameters to change.
        """
        if self.begun.complete:
            return
        self.needs.check()
        needed = self.stored + self.temporary - self.written
        if self.free is not None and needed > self.free:
            raise OptionError(
                f"`out`: expected a disk with room for the index, found {amount_of_bytes(self.free)} free at "
                f"{self.out} and {amount_of_bytes(needed)} needed ({amount_of_bytes(self.stored)} when finished, "
                f"{amount_of_bytes(self.temporary)} more until then, {amount_of_bytes(self.written)} of it written); "
                "choose another folder, a `codec` of fewer bits, a smaller `side` or a `limit`"
            )

    def _rows(self) -> str:
        side, codec = self.settings.side, self.settings.codec
        size = amount_of_bytes(row_bytes(codec, self.dimensions, self.blocks))
        coordinates = "whitened" if self.settings.whitened else "projected"
        return f"{self.dimensions:,} dimensions ({self.blocks} blocks of {side}×{side}), {codec}, {coordinates}, {size}"

    def _r_train(self) -> str:
        if not self.settings.whitened:
            return "of all examples"
        if self.sample >= self.corpus.examples:
            return f"of all examples, which are no more than {self.settings.whitening_examples:,}"
        return f"of a sample of {self.sample:,} examples, in a first pass"

    def _disk(self) -> str:
        more = f", {amount_of_bytes(self.temporary)} more until then" if self.temporary else ""
        free = "free space not checked" if self.free is None else f"{amount_of_bytes(self.free)} free"
        return f"about {amount_of_bytes(self.stored)} when finished{more}; {free}"

    def _time(self) -> str:
        begun = self.begun
        done = f"; {begun.examples:,} examples are done" if begun.examples else ""
        if begun.sampled:
            done += f"; {begun.sampled:,} of the first pass are done"
        part = "" if self.share is None else f"part {self.share.number} of {self.share.count}: "
        return f"{part}{self.needs.time_in_words(self.settings)}{done}"


def plan_index(
    model: LanguageModel | str | Path,
    data: object,
    out: str | Place,
    settings: IndexSettings | None = None,
    *,
    share: Share | str | None = None,
) -> IndexPlan:
    """Plan an index: what `build_index` would compute, the time, and what it needs. Nothing is written.

    Args:
        model: A loaded model, or the folder, hub name or `.gguf` file to load one from.
        data: The corpus: an opened one, or what `open_corpus` opens.
        out: The index's folder or URL. Of an index that is begun there, what is left is planned.
        settings: What the index is asked to be; None is the defaults.
        share: The part of the index that is planned, `i/n`; None is all of it.

    Raises:
        TrackstarError: Something cannot be read; see `trackstar.errors`.
    """
    if not isinstance(model, LanguageModel):
        model = load_model(model)
    corpus = data if isinstance(data, Corpus) else open_corpus(data, tokenizer=model.tokenizer)
    share = Share.parsed(share) if isinstance(share, str) else share
    return plan_corpus(model, corpus, as_folder(out), settings or IndexSettings(), share=share)


def plan_corpus(
    model: LanguageModel,
    corpus: Corpus,
    out: Place,
    settings: IndexSettings,
    *,
    share: Share | None = None,
    like: IndexPlan | None = None,
) -> IndexPlan:
    """Plan an index of an opened corpus; see `plan_index`.

    If the side is left to choose, it is one for which memory suffices, but for a share of an index, all of
    which have one side.

    Args:
        model: The model.
        corpus: The corpus.
        out: The index's folder.
        settings: What the index is asked to be.
        share: The part of the index that is planned.
        like: The plan of another index of the same corpus and model, whose counts and first batch are taken.
    """
    refuse_foreign_folder(out)
    if like is None:
        read = corpus.for_tokenizer(model.tokenizer, pack=settings.pack)
        size = corpus_size(read, model, windows_entry(model, settings))
    else:
        size = like.corpus
    parameters, blocks = model.coverage.parameters, len(model.blocks)
    chosen, why = chosen_settings(settings, parameters=parameters, blocks=blocks, examples=size.examples, out=out)
    plan = _plan(model, size, out, chosen, why, share=share, batch=None if like is None else like.needs.batch)
    if settings.side is not None or share is not None or is_begun(out):
        return plan
    for side in smaller_sides(chosen.side):
        if plan.needs.suffice:
            break
        room = f"{amount_of_bytes(plan.needs.room.amount)} available"
        reason = f"side {side}, as {plan.settings.side} needs {amount_of_bytes(plan.needs.more)} with {room}"
        smaller = dataclasses.replace(settings, side=side)
        chosen, why = chosen_settings(smaller, parameters=parameters, blocks=blocks, examples=size.examples)
        plan = _plan(model, size, out, chosen, (reason, *why), share=share, batch=plan.needs.batch)
    return plan


def _plan(
    model: LanguageModel,
    size: CorpusSize,
    out: Place,
    settings: ChosenSettings,
    defaults: tuple[str, ...],
    *,
    share: Share | None,
    batch: FirstBatch | None,
) -> IndexPlan:
    """The plan of an index with nothing left to choose; a first batch is measured if there is none."""
    begun = begun_index(out)
    source, estimated = planned_second_moment(settings, model)
    used = memory_in_use(model)
    sample = min(size.examples, round(settings.whitening_examples * size.examples / max(1, size.records)))
    stages = ()
    if not begun.complete:
        if batch is None:
            batch = first_batch(model, settings, size.windows, size.tokens + second_moment_tokens(size, estimated))
        stages = _stages(model, size, settings, estimated, sample, begun, batch, share)
    stored, temporary = _disk(model, size, settings, sample)
    return IndexPlan(
        out=str(out),
        model=f"{model.source} ({sum(p.numel() for p in model.module.parameters()):,} parameters)",
        corpus=size,
        blocks=len(model.blocks),
        settings=settings,
        defaults=defaults,
        second_moment=source,
        sample=sample,
        begun=begun,
        share=share,
        needs=Needs.of(model, settings, stages, batch, used),
        stored=stored,
        temporary=temporary,
        written=_written(out),
        free=free_disk(out) if isinstance(out, Path) else None,
    )


def _written(out: Place) -> int:
    """Bytes in a local folder."""
    if not isinstance(out, Path):
        return 0
    with contextlib.suppress(OSError):  # another process may remove a file meanwhile
        return sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    return 0


def begun_index(out: Place) -> Begun:
    """What exists of the index at `out`; what cannot be read is not counted."""
    examples = sampled = 0
    whitened = complete = False
    with contextlib.suppress(TrackstarError, OSError):
        index = Index.open(out, allow_incomplete=True)
        examples, complete = index.rows, index.manifest.completion is not None
        whitened = index.manifest.whitening is not None
    if not complete:
        with contextlib.suppress(TrackstarError, OSError):
            sampled = Index.open(out / PART_FOLDER, allow_incomplete=True).rows
    return Begun(examples=examples, sampled=sampled, whitened=whitened, complete=complete)


def _stages(
    model: LanguageModel,
    size: CorpusSize,
    settings: ChosenSettings,
    estimated: int,
    sample: int,
    begun: Begun,
    batch: FirstBatch | None,
    share: Share | None,
) -> tuple[Stage, ...]:
    """The stages of an index that are left."""
    blocks, side, codec = len(model.blocks), settings.side, settings.codec
    passes = batch_bytes(model, settings, size.tokens, longest(size), batch)
    per_example = size.tokens / max(1, size.examples)
    left = max(0, size.examples - begun.examples)
    group = min(costs.GROUP_EXAMPLES, size.examples)
    shard = settings.shard_examples or default_shard_examples(blocks, side, codec)
    codes = costs.rows_bytes(codec, blocks, side, min(shard, size.examples))
    decoded = costs.rows_bytes("float32", blocks, side, group)
    stages: list[Stage] = []
    if estimated and not begun.examples and not begun.sampled and not begun.whitened:
        stages.append(second_moment_stage(model, size, settings, estimated, batch))
    r_train = costs.r_train_cost(blocks, side, sample if settings.whitened else size.examples)
    if settings.whitened:
        if not begun.whitened:
            stored = costs.rows_bytes("float16", blocks, side, group)
            memory = max(r_train.held + 2 * stored + max(passes, decoded), r_train.most)
            changes = _changes(memory, passes)
            tokens = per_example * max(0, sample - begun.sampled)
            stages.append(made_stage("first pass", memory, tokens, r_train.work, batch, changes))
            factor, rotation = costs.whitening_cost(blocks, side, sample), costs.rotation_cost(blocks, side, sample)
            most = factor.most + rotation.most
            stages.append(made_stage("whitening", most, 0.0, factor.work + rotation.work, batch, "side"))
        left = left if share is None else left / share.count
        rows = costs.whitened_rows_cost(blocks, side, round(left), sample)
        w_train = costs.whitening_cost(blocks, side, sample).held
        memory = w_train + 2 * codes + max(rows.held + passes, rows.most)
        known = max(0, sample - begun.examples) if share is None else sample / share.count
        tokens = per_example * max(0.0, left - known)
        changes = _changes(memory, passes)
        stages.append(made_stage("rows", memory, tokens, rows.work, batch, changes))
    else:
        memory = max(r_train.held + 2 * codes + max(passes, decoded), r_train.most)
        changes = _changes(memory, passes)
        left = left if share is None else left / share.count
        stages.append(made_stage("rows", memory, per_example * left, r_train.work, batch, changes))
    return tuple(stages)


def _changes(memory: int, passes: int) -> str:
    """The setting that changes most of a stage's memory: that of the batches' graph, or of all else."""
    return "batch_tokens" if 2 * passes > memory else "side"


def _disk(model: LanguageModel, size: CorpusSize, settings: ChosenSettings, sample: int) -> tuple[int, int]:
    """Bytes of the finished index, and those that it needs besides until it is finished."""
    blocks, side = len(model.blocks), settings.side
    moment = 0
    if str(settings.second_moment) != "none":
        moment = costs.second_moment_bytes(model.matrices, settings.second_moment_kind)
    beside = costs.example_bytes(size.examples, size.tokens, size.string_bytes)
    stored = costs.rows_bytes(settings.codec, blocks, side, size.examples) + beside + moment
    r_train = costs.r_train_cost(blocks, side, sample if settings.whitened else size.examples)
    if not settings.whitened:
        return stored + r_train.stored, 0
    part = costs.rows_bytes("float16", blocks, side, sample) + round(beside * sample / max(1, size.examples))
    return stored + costs.whitening_cost(blocks, side, sample).stored, part + moment + r_train.stored
