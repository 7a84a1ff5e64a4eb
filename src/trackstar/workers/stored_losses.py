"""Compare losses that are computed again with those that an index stores.

An index stores the loss of every example. Another model, configuration or library version gives
other losses, and so do damaged tokens, whatever else was overlooked. So wherever an example of an
index is computed again, its loss is compared with the stored one, and a few examples are computed
for that purpose when an index meets its model.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from trackstar.errors import DamagedIndexError, IndexMismatchError
from trackstar.gradients.per_example import loss_and_hidden_gradients
from trackstar.model.batching import make_batch
from trackstar.model.configuration import libraries
from trackstar.model.language_model import LanguageModel
from trackstar.store import Index, Place, Shard, StoredExample
from trackstar.text import one_line

# Examples that are computed when an index meets its model, and their preferred length in tokens.
_SAMPLE = 4
_SAMPLE_TOKENS = 64

TOLERANCE = {"float64": 2e-5, "float32": 2e-5, "float16": 5e-3, "bfloat16": 2e-2}
"""Largest difference of two losses that rounding explains, in nats per nat and per target token.

Batches of other shapes and other numbers of threads change a loss by up to 2e-7 of this unit in float32
and 2e-3 in bfloat16 (docs/log.md); other devices are given more."""


def check_sample(index: Index, model: LanguageModel, *, skip_damaged: bool = False) -> None:
    """Compute a few stored examples, and raise if their losses are not those that the index stores.

    Args:
        index: The index, which may be unfinished.
        model: The model that it is said to be made with.
        skip_damaged: Whether to pass over shards that are damaged, as the caller writes them again.

    Raises:
        IndexMismatchError: A loss differs; the message names the example and the likely causes.
        DamagedIndexError: A stored example is damaged.
    """
    shards = [index.shards[number] for number in sorted({*_spread(len(index.shards))})]
    for shard in shards:
        try:
            check_again(index, model, _sampled(shard, -(-_SAMPLE // len(shards))))
        except DamagedIndexError:
            if not skip_damaged:
                raise


def _sampled(shard: Shard, count: int) -> list[StoredExample]:
    """Examples of a shard, of about the preferred length."""
    distances = (torch.from_numpy(shard.read("token_offsets")).diff() - _SAMPLE_TOKENS).abs()
    return [shard.example(row) for row in sorted(distances.argsort(stable=True)[:count].tolist())]


def check_again(index: Index, model: LanguageModel, stored: Sequence[StoredExample]) -> None:
    """Compute stored examples one by one, and raise if their losses are not those that the index stores.

    Raises:
        IndexMismatchError: A loss differs.
        DamagedIndexError: A stored example is damaged.
    """
    check_tokens(index.path, model, stored)
    examples = [one.example for one in stored]
    losses = torch.empty(len(examples))
    for place in range(len(examples)):
        batch = make_batch(examples, [place], device=model.device)
        with torch.no_grad(), model.frozen():
            hidden = model.hidden_states(batch.token_ids)
            found, _ = loss_and_hidden_gradients(model.head, hidden, batch.token_ids, batch.target_mask)
            losses[place] = found.cpu()[0]
    check_losses(index, model, stored, losses)


def check_losses(
    index: Index, model: LanguageModel, stored: Sequence[StoredExample], losses: Float[Tensor, "examples"]
) -> None:
    """Raise if recomputed losses of stored examples are not those that the index stores.

    Args:
        index: The index.
        model: The model that computed the losses.
        stored: The examples.
        losses: Their recomputed losses, in nats.

    Raises:
        IndexMismatchError: A loss differs by more than rounding explains.
    """
    tolerance = TOLERANCE[model.dtype_name]
    for one, loss in zip(stored, losses.tolist(), strict=True):
        targets = int(one.example.target_mask.sum())
        if not abs(loss - one.loss) <= tolerance * (abs(one.loss) + targets):
            then = index.manifest.model.libraries
            versions = f"made with {then}, here {libraries()}" if then not in (None, libraries()) else libraries()
            raise IndexMismatchError(
                f"{index.path}: example {one_line(one.example.example_id)} (row {one.row}) has loss {loss:.6g} with "
                f"{model.source}, expected the stored {one.loss:.6g}; the model, its configuration or a library "
                f"({versions}) is not the one that the index was made with, or the example is damaged: `verify` finds "
                "damage; else use the old model and libraries, or build the index again"
            )


def check_tokens(path: Place, model: LanguageModel, stored: Sequence[StoredExample]) -> None:
    """Raise if a stored example has a token that the model does not know, or more than it reads.

    Raises:
        DamagedIndexError: A token is out of range; the message names the example.
    """
    known = model.vocabulary
    for one in stored:
        tokens = one.example.token_ids
        wrong = tokens[(tokens < 0) | (tokens >= known)]
        if len(wrong):
            raise DamagedIndexError(
                f"{path}: example {one_line(one.example.example_id)} (row {one.row}) has token {wrong[0]}, expected 0 "
                f"to {known - 1}, the model's vocabulary; `verify` finds damage; else pass the model that was indexed "
                "as `model`"
            )


def _spread(shards: int) -> list[int]:
    """Numbers of up to `_SAMPLE` shards, from the first to the last."""
    return [place * (shards - 1) // max(1, _SAMPLE - 1) for place in range(_SAMPLE)] if shards else []
