"""The plan of a streamed corpus: what `stream_queries` computes, how long it takes, and the memory for it."""

import dataclasses

from trackstar.corpus import Corpus
from trackstar.indexing import costs
from trackstar.indexing.corpus_size import CorpusSize, corpus_size
from trackstar.indexing.defaults import chosen_settings
from trackstar.indexing.first_batch import batch_bytes, first_batch
from trackstar.indexing.needs import (
    Needs,
    Stage,
    longest,
    made_stage,
    memory_in_use,
    second_moment_stage,
    second_moment_tokens,
)
from trackstar.indexing.provenance import windows_entry
from trackstar.indexing.second_moment import planned_second_moment
from trackstar.indexing.settings import ChosenSettings, IndexSettings
from trackstar.model.language_model import LanguageModel

_EXAMPLES_AT_ONCE = 256


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StreamPlan:
    """What a pass of a corpus against some queries costs; `str(plan)` is what the command line prints.

    Attributes:
        model: The model, in words.
        queries: Number of queries, those of the task included.
        corpus: Size of the corpus.
        blocks: Number of layer blocks.
        settings: Settings of the gradients, with what was left to choose.
        defaults: Why the side was chosen, in words; none if it was given.
        second_moment: V's source, in words.
        sample: Number of examples that R_train is computed from; their gradients are computed twice.
        needs: The stages of the work, with memory and time.
    """

    model: str
    queries: int
    corpus: CorpusSize
    blocks: int
    settings: ChosenSettings
    defaults: tuple[str, ...]
    second_moment: str
    sample: int
    needs: Needs

    @property
    def dimensions(self) -> int:
        """Dimensions of φ."""
        return self.blocks * self.settings.side**2

    def lines(self) -> tuple[str, ...]:
        """The plan, a line for each subject."""
        side = self.settings.side
        return (
            f"plan: stream {self.corpus.records:,} records through {self.model} against {self.queries:,} queries",
            f"  corpus: {self.corpus}",
            f"  gradients: {self.dimensions:,} dimensions ({self.blocks} blocks of {side}×{side}), not stored",
            *(f"  default: {why}" for why in self.defaults),
            f"  V: {self.second_moment}",
            f"  R_train: of {self.sample:,} examples, whose gradients are computed twice",
            f"  memory: {self.needs.memory_in_words()}",
            f"  time: {self.needs.time_in_words(self.settings)}",
        )

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def check(self) -> None:
        """Raise if memory does not suffice.

        Raises:
            OptionError: It does not; the message names the numbers and the parameters to change.
        """
        self.needs.check()


def plan_stream(model: LanguageModel, corpus: Corpus, settings: IndexSettings, *, queries: int) -> StreamPlan:
    """Plan a pass of a corpus against some queries. Nothing is written.

    Args:
        model: The model.
        corpus: The corpus, as the model's tokenizer reads it.
        settings: Settings of the gradients.
        queries: Number of queries, those of the task included.

    Raises:
        TrackstarError: Something cannot be read; see `trackstar.errors`.
    """
    size = corpus_size(corpus, model, windows_entry(model, settings))
    source, estimated = planned_second_moment(settings, model)
    used = memory_in_use(model)
    settings, why = chosen_settings(
        settings, parameters=model.coverage.parameters, blocks=len(model.blocks), examples=size.examples
    )
    blocks, side = len(model.blocks), settings.side
    per_example = size.tokens / max(1, size.examples)
    sample = min(size.examples, round(settings.whitening_examples * size.examples / max(1, size.records)))
    tokens = size.tokens + per_example * sample + second_moment_tokens(size, estimated)
    batch = first_batch(model, settings, size.windows, tokens)
    passes = batch_bytes(model, settings, size.tokens, longest(size), batch)
    r_train, factor = costs.r_train_cost(blocks, side, sample), costs.whitening_cost(blocks, side, sample)
    held = costs.rows_bytes("float32", blocks, side, min(_EXAMPLES_AT_ONCE, size.examples) + queries)
    whitened = costs.whitened_rows_cost(blocks, side, size.examples, sample)
    stages: list[Stage] = []
    if estimated:
        stages.append(second_moment_stage(model, size, settings, estimated, batch))
    stages.append(
        made_stage(
            "R_train",
            max(r_train.held + held + passes, r_train.most),
            per_example * (sample + queries),
            r_train.work,
            batch,
            "side" if r_train.most > passes else "batch_tokens",
        )
    )
    stages.append(made_stage("whitening", factor.most + r_train.stored, 0.0, factor.work, batch, "side"))
    stages.append(
        made_stage(
            "streaming",
            2 * factor.held + held + max(passes, 2 * held),
            float(size.tokens),
            whitened.work,
            batch,
            "side" if 2 * factor.held > passes else "batch_tokens",
        )
    )
    return StreamPlan(
        model=f"{model.source} ({sum(p.numel() for p in model.module.parameters()):,} parameters)",
        queries=queries,
        corpus=size,
        blocks=blocks,
        settings=settings,
        defaults=why,
        second_moment=source,
        sample=sample,
        needs=Needs.of(model, settings, tuple(stages), batch, used),
    )
