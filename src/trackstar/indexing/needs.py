"""What work needs: its stages, their memory and time, and whether the memory is there."""

import dataclasses

from trackstar.errors import OptionError
from trackstar.indexing import costs
from trackstar.indexing.corpus_size import CorpusSize
from trackstar.indexing.first_batch import FirstBatch, batch_bytes
from trackstar.indexing.machine import Room, available_device_memory, available_memory, resident_memory
from trackstar.indexing.settings import ChosenSettings
from trackstar.model.language_model import LanguageModel
from trackstar.text import amount_of_bytes, duration

_LESS_MEMORY = "choose a smaller `side`, fewer `batch_tokens`, or a machine with more memory"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A stage of the work.

    Attributes:
        name: Its name.
        memory: Most bytes of memory that it needs beside the model and the projections.
        tokens: Number of tokens whose gradients it computes, weighed by their cost.
        work: Its other operations.
        seconds: Its time; None if no batch was measured.
        changes: The parameter that its memory follows.
    """

    name: str
    memory: int
    tokens: float
    work: costs.Operations
    seconds: float | None
    changes: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """The stages of some work, with memory and time.

    Attributes:
        stages: The stages that are left, in order.
        batch: The measured first batch; None if the work is too small to measure one.
        memory: Most bytes of memory at any time, of this process as a whole.
        used: Bytes of it that are in use already.
        room: What else can be used.
        on_device: Whether memory is that of a GPU.
    """

    stages: tuple[Stage, ...]
    batch: FirstBatch | None
    memory: int
    used: int
    room: Room
    on_device: bool

    @classmethod
    def of(
        cls,
        model: LanguageModel,
        settings: ChosenSettings,
        stages: tuple[Stage, ...],
        batch: FirstBatch | None,
        used: int,
    ) -> "Needs":
        """The needs of the stages.

        Args:
            model: The model.
            settings: The settings of its gradients.
            stages: The stages.
            batch: The measured first batch.
            used: Bytes of memory in use, see `memory_in_use`.
        """
        device = available_device_memory(model.device)
        most = max((stage.memory for stage in stages), default=0)
        return cls(
            stages=stages,
            batch=batch,
            memory=used + most + (costs.projection_bytes(model.matrices, settings.side) if stages else 0),
            used=used,
            room=available_memory() if device is None else device,
            on_device=device is not None,
        )

    @property
    def largest(self) -> Stage:
        """The stage that needs most memory; there must be one."""
        return max(self.stages, key=lambda stage: stage.memory)

    @property
    def seconds(self) -> float | None:
        """Time of all stages; None if no batch was measured."""
        times = [stage.seconds for stage in self.stages]
        return None if None in times else sum((time for time in times if time is not None), 0.0)

    @property
    def more(self) -> int:
        """Bytes of memory that are needed beside those in use."""
        return self.memory - self.used

    @property
    def suffice(self) -> bool:
        """Whether there is memory enough."""
        return not self.stages or self.more <= self.room.amount

    def check(self) -> None:
        """Raise if memory does not suffice.

        Raises:
            OptionError: It does not; the message names the numbers and the parameters to change.
        """
        if not self.suffice:
            raise OptionError(
                f"`{self.largest.changes}`: expected work that fits into memory, found {amount_of_bytes(self.memory)} "
                f"needed at peak ({self.largest.name}), of which {amount_of_bytes(self.used)} are in use, and "
                f"{amount_of_bytes(self.room.amount)} more available ({self.room.limit}); {_LESS_MEMORY}"
            )

    def memory_in_words(self) -> str:
        """Memory at peak, in which stage, what is in use, and what else there is."""
        if not self.stages:
            return "none"
        where = " of the GPU" if self.on_device else ""
        return (
            f"about {amount_of_bytes(self.memory)}{where} at peak ({self.largest.name}), {amount_of_bytes(self.used)} "
            f"of it in use; {amount_of_bytes(self.room.amount)} more available ({self.room.limit})"
        )

    def time_in_words(self, settings: ChosenSettings) -> str:
        """Time of the work and of its stages, and what it was measured by."""
        if self.batch is None or self.seconds is None:
            why = "one-sided projections" if settings.projection == "one-sided" else "so little work"
            return f"not measured for {why}"
        stages = ", ".join(f"{stage.name} {duration(stage.seconds or 0.0)}" for stage in self.stages)
        return (
            f"about {duration(self.seconds)} ({stages}), from a first batch of {self.batch.tokens:,} tokens in "
            f"{duration(self.batch.seconds)}"
        )


def second_moment_stage(
    model: LanguageModel, size: CorpusSize, settings: ChosenSettings, estimated: int, batch: FirstBatch | None
) -> Stage:
    """V's estimate from some examples."""
    kind = settings.second_moment_kind
    passes = batch_bytes(model, settings, size.tokens, longest(size), batch)
    tokens = second_moment_tokens(size, estimated) * costs.second_moment_factor(kind)
    memory = passes + costs.second_moment_memory(model.matrices, kind)
    return made_stage("V", memory, tokens, costs.Operations(), batch, "batch_tokens")


def made_stage(
    name: str, memory: int, tokens: float, work: costs.Operations, batch: FirstBatch | None, changes: str
) -> Stage:
    """A stage, with its time if a batch was measured."""
    seconds = None if batch is None else tokens / batch.tokens_per_second + batch.rates.seconds(work)
    return Stage(name=name, memory=memory, tokens=tokens, work=work, seconds=seconds, changes=changes)


def second_moment_tokens(size: CorpusSize, estimated: int) -> float:
    """Tokens of the examples that V is estimated from."""
    return min(estimated, size.records) * size.tokens / max(1, size.examples)


def longest(size: CorpusSize) -> int:
    """Number of tokens of the longest example that was seen."""
    return max((len(window.token_ids) for window in size.windows), default=0)


def memory_in_use(model: LanguageModel) -> int:
    """Bytes of memory in use before any gradient is computed: the model, and on the CPU the process.

    A number of every page of the weights is read, so that weights in mapped files count.
    """
    if model.device.type == "cuda":
        import torch

        return torch.cuda.memory_allocated(model.device)
    for parameter in model.module.parameters():
        if parameter.device.type == "cpu":
            parameter.detach().flatten()[:: 4096 // parameter.element_size()].float().sum()
    return resident_memory()
