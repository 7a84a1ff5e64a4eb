"""What an index is made with, where its user left it open: V and windows (§3)."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from trackstar.choices import CodecName, Coordinates, Output, ProjectionKind
from trackstar.corpus import Corpus, TokenizedExample, tokenize_examples
from trackstar.errors import CorpusError, DamagedIndexError, OptionError, SecondMomentError
from trackstar.gradients.estimated_moment import estimate_second_moment
from trackstar.gradients.optimizer_state import find_optimizer_state, second_moment_from_state
from trackstar.gradients.second_moment import NO_SECOND_MOMENT, SecondMoment, checked_second_moment
from trackstar.model.language_model import LanguageModel
from trackstar.store import IndexTensors, Place, WindowsEntry, load_manifest


def check_positive(option: str, value: int | None) -> None:
    """See that a number that was given is at least 1.

    Raises:
        OptionError: It is not; the message names the option.
    """
    if value is not None and value < 1:
        raise OptionError(f"{option} {value}: expected 1 or more")


def chosen_windows(model: LanguageModel, *, window_tokens: int | None, overlap: int, batch_tokens: int) -> WindowsEntry:
    """How long documents are split: as asked, or into what the model reads and a batch holds.

    Raises:
        OptionError: The model reads fewer tokens than a window is asked to have.
    """
    check_positive("--batch-tokens", batch_tokens)
    tokens = window_tokens or min(model.context_tokens, batch_tokens)
    if tokens > model.context_tokens:
        raise OptionError(
            f"--window-tokens {tokens}: the model reads at most {model.context_tokens} tokens; give no more"
        )
    return WindowsEntry(tokens=tokens, overlap=overlap)


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
    out: Place | None,
    note: Callable[[str], None],
    estimate: Callable[[Sequence[TokenizedExample]], SecondMoment] | None = None,
) -> SecondMoment:
    """V as asked for: given, none, from optimizer state, or estimated; see `build_index`.

    An estimate that an interrupted run has already made for the same index is taken from there. `estimate` makes it of
    a sample; None has this process make it.
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
        with contextlib.suppress(DamagedIndexError, SecondMomentError):  # it is estimated again
            kept = IndexTensors(out).read("second_moment", begun)
            moment = SecondMoment.from_tensors(kept, source=source, floor=begun.second_moment.floor)
            if moment.kind == kind:
                return checked_second_moment(moment, model.matrices)
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
    if estimate is None:
        moment = estimate_second_moment(model, chosen, kind=kind, token_budget=batch_tokens, note=note)
    else:
        moment = estimate(chosen)
    return checked_second_moment(dataclasses.replace(moment, source=source), model.matrices)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class IndexSettings:
    """What an index is asked to be; see `build_index`."""

    second_moment: str | Path | SecondMoment
    second_moment_kind: Literal["factored", "elementwise"]
    second_moment_examples: int
    side: int
    seed: int
    codec: CodecName
    coordinates: Coordinates
    whitening_examples: int
    damping: float | None
    shard_examples: int
    output: Output
    projection: ProjectionKind
