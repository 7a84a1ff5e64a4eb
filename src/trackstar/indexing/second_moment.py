"""V of a new index: given, read from optimizer state, estimated, or none (paper, §4.1)."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from trackstar.corpus import Corpus, TokenizedExample, tokenize_examples
from trackstar.errors import CorpusError, DamagedIndexError, SecondMomentError
from trackstar.gradients.estimated_moment import checked_estimate, estimate_second_moment
from trackstar.gradients.optimizer_state import MERGED_ADVICE, find_optimizer_state, second_moment_from_state
from trackstar.gradients.second_moment import NO_SECOND_MOMENT, SecondMoment, checked_second_moment
from trackstar.indexing.settings import IndexSettings
from trackstar.model.language_model import LanguageModel
from trackstar.progress import Progress
from trackstar.store import IndexTensors, Place, WindowsEntry, load_manifest

Estimate = Callable[[Sequence[TokenizedExample], Callable[[int], None]], SecondMoment]
"""Estimates V from examples, and calls a function with the number of each batch's examples."""


def second_moment_for(
    settings: IndexSettings,
    model: LanguageModel,
    corpus: Corpus,
    windows: WindowsEntry,
    *,
    out: Place | None,
    note: Callable[[str], None],
    estimate: Estimate | None = None,
    progress: bool = False,
) -> SecondMoment:
    """V as the settings ask, checked against the model's matrices.

    Args:
        settings: How V is asked for; see `IndexSettings.second_moment`.
        model: The model.
        corpus: The corpus that V is estimated from, if it is.
        windows: How documents are split.
        out: Folder of the index. An estimate that an interrupted run has written there is read
            again. None computes it.
        note: Callback that receives notes for the user.
        estimate: Estimates V from a sample; None estimates in this process.
        progress: Whether progress is shown.

    Raises:
        SecondMomentError: V cannot be read from optimizer state, or does not fit the model.
        CorpusError: V cannot be estimated, because no record of the sample has a token to score.
    """
    requested = settings.second_moment
    if isinstance(requested, SecondMoment):
        return checked_second_moment(requested, model.matrices)
    if str(requested) == "none":
        return NO_SECOND_MOMENT
    state = _optimizer_state(requested, model)
    if state is not None and _is_of_adapter(state, model):
        if str(requested) != "auto":
            raise SecondMomentError(
                f"{state}: is the state of the adapter's training, of matrices that the merged network does not have; "
                f"expected that of the merged network's{MERGED_ADVICE}"
            )
        note(
            f"second moment: {state} is of the adapter's matrices, not of the merged network's, and is not used; "
            '`parameters="adapter"` takes gradients of the adapter\'s'
        )
        state = None
    if state is not None:
        moment = second_moment_from_state(state, model, kind=settings.second_moment_kind)
        return checked_second_moment(moment, model.matrices)
    source = f"estimated from {settings.second_moment_examples} examples drawn with seed {settings.seed}"
    written = _written_estimate(out, settings, model, source)
    if written is not None:
        return written
    note(f"second moment: {'no optimizer state beside the model, so V is ' if requested == 'auto' else ''}{source}")
    sample = _first_windows(corpus, model, windows, settings, progress=progress)
    with Progress("Estimating V", unit="examples", total=len(sample), shown=progress) as bar:
        if estimate is None:
            moment = estimate_second_moment(
                model, sample, kind=settings.second_moment_kind, batch_tokens=settings.batch_tokens, note=note,
                advance=bar.advance,
            )  # fmt: skip
        else:
            moment = estimate(sample, bar.advance)
    return checked_estimate(dataclasses.replace(moment, source=source), model, sample)


def planned_second_moment(settings: IndexSettings, model: LanguageModel) -> tuple[str, int]:
    """V's source in words, and the number of examples that it is estimated from: 0 if it is not.

    Nothing is read but the names of files beside the model.
    """
    requested, kind = settings.second_moment, settings.second_moment_kind
    if isinstance(requested, SecondMoment):
        return f"{requested.kind}, given", 0
    if str(requested) == "none":
        return "none", 0
    state = _optimizer_state(requested, model)
    if state is not None and not (_is_of_adapter(state, model) and str(requested) == "auto"):
        return f"{kind}, read from {state}", 0
    count = settings.second_moment_examples
    return f"{kind}, estimated from {count:,} examples", count


def _optimizer_state(requested: str | Path, model: LanguageModel) -> Path | None:
    """The file or folder of optimizer state to read; None if V is to be estimated."""
    if str(requested) == "auto":
        return find_optimizer_state(model.folder) if model.folder is not None else None
    if str(requested) == "estimate":
        return None
    state = Path(requested)
    return (find_optimizer_state(state) or state) if state.is_dir() else state


def _is_of_adapter(state: Path, model: LanguageModel) -> bool:
    """Whether a file of optimizer state lies beside the adapter that was merged into the model."""
    if model.parameters != "merged" or model.folder is None:
        return False
    return model.folder.resolve() in (state.resolve(), state.resolve().parent)


def _written_estimate(
    out: Place | None, settings: IndexSettings, model: LanguageModel, source: str
) -> SecondMoment | None:
    """The estimate that an interrupted run has written for the same index; None if there is none,
    or it is damaged.
    """
    begun = load_manifest(out) if out is not None else None
    if out is None or begun is None:
        return None
    if (begun.second_moment.source, begun.second_moment.kind) != (source, settings.second_moment_kind):
        return None
    with contextlib.suppress(DamagedIndexError, SecondMomentError):
        tensors = IndexTensors(out).read("second_moment", begun)
        moment = SecondMoment.from_tensors(tensors, source=source, floor=begun.second_moment.floor)
        if moment.kind == settings.second_moment_kind:
            return checked_second_moment(moment, model.matrices)
    return None


def _first_windows(
    corpus: Corpus, model: LanguageModel, windows: WindowsEntry, settings: IndexSettings, *, progress: bool
) -> list[TokenizedExample]:
    """The sample that V is estimated from: of each drawn record its first window, which stands for
    the document.
    """
    drawn = corpus.sample(settings.second_moment_examples, settings.seed, progress=progress)
    tokenized = tokenize_examples(
        drawn, model.tokenizer, window_tokens=windows.tokens, overlap=windows.overlap, truncate=windows.truncate
    )
    sample = [parts[0] for parts in tokenized if parts]
    if not sample:
        raise CorpusError(
            f"{corpus.name}: none of {settings.second_moment_examples} records drawn from it has a token to score, "
            "expected texts of two tokens or more to estimate V from"
        )
    return sample
