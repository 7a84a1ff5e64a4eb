"""Token-budgeted, length-sorted batches, padded on the right, that shrink when memory runs out."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from trackstar.corpus import TokenizedExample
from trackstar.errors import OptionError

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Examples side by side, padded on the right.

    Attributes:
        token_ids: What the model reads; padding repeats token 0, which causal attention hides from what is before it.
        target_mask: Where true, the token's cross-entropy counts; false on padding and at the first position.
        places: The examples' places in the sequence that the batch was made from.
    """

    token_ids: Int64[Tensor, "batch tokens"]
    target_mask: Bool[Tensor, "batch tokens"]
    places: tuple[int, ...]


def make_batch(
    examples: Sequence[TokenizedExample], places: Sequence[int], *, device: torch.device | str = "cpu", pad_to: int = 0
) -> Batch:
    """Pad the examples at `places` to the longest of them, or to `pad_to` tokens if that is longer."""
    chosen = [examples[place] for place in places]
    width = max(pad_to, *(len(example.token_ids) for example in chosen))
    token_ids = np.zeros((len(chosen), width), dtype=np.int64)
    target_mask = np.zeros((len(chosen), width), dtype=bool)
    for row, example in enumerate(chosen):
        token_ids[row, : len(example.token_ids)] = example.token_ids
        target_mask[row, : len(example.token_ids)] = example.target_mask
    return Batch(
        token_ids=torch.from_numpy(token_ids).to(device),
        target_mask=torch.from_numpy(target_mask).to(device),
        places=tuple(places),
    )


def plan_batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Group examples of similar length so that no batch exceeds the budget once padded.

    The longest come first, so that memory runs out at once or not at all. An example longer than the budget is a
    batch of its own.

    Args:
        lengths: Tokens of each example.
        token_budget: Most tokens of a batch, padding included.

    Returns:
        Places of each batch's examples.

    Raises:
        OptionError: The budget is not positive.
    """
    if token_budget < 1:
        raise OptionError(f"--batch-tokens {token_budget}: expected 1 or more tokens a batch")
    order = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    batches: list[list[int]] = []
    for place in order:
        # Descending lengths: a batch is as wide as its first example.
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= token_budget:
            batches[-1].append(place)
        else:
            batches.append([place])
    return batches


def run_adaptively(
    batches: Sequence[list[int]], run: Callable[[list[int]], Result], note: Callable[[str], None]
) -> Iterator[tuple[list[int], Result]]:
    """Run every batch; one that does not fit in memory is halved, and so are all larger ones after it.

    Args:
        batches: Places of each batch's examples.
        run: What to do with one batch.
        note: Told once each time that batches are made smaller.

    Yields:
        The places of a batch that ran, and its result.

    Raises:
        OptionError: A single example does not fit in memory.
    """
    pending = list(reversed(batches))
    most: int | None = None
    while pending:
        places = pending.pop()
        if most is not None and len(places) > most:
            pending += [places[most:], places[:most]]
            continue
        try:
            result = run(places)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            if len(places) == 1:
                raise OptionError(
                    "one example alone does not fit in memory; expected room for its activations; "
                    "use shorter windows (--window-tokens), bfloat16 or a larger machine"
                ) from None
            most = (len(places) + 1) // 2
            note(f"memory ran out at {len(places)} examples a batch; going on with at most {most}")
            pending.append(places)
            result = None
        if result is None:
            # Outside the except block, so that the failed pass's tensors are no longer held by its traceback.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        yield places, result


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return "can't allocate memory" in str(error) or "out of memory" in str(error).lower()
