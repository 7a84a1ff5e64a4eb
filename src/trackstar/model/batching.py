"""Batches within a token budget, sorted by length, padded on the right, and halved if memory runs out."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from trackstar.corpus import TokenizedExample
from trackstar.errors import ModelError, OptionError, check_at_least
from trackstar.text import one_line

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Examples side by side, padded on the right.

    Attributes:
        token_ids: The model's input. Padding is token 0, which causal attention hides from the
            tokens before it.
        target_mask: True if the token's cross-entropy enters the loss; false on padding and at the
            first position.
        indices: Index of each example in the sequence that the batch was taken from.
    """

    token_ids: Int64[Tensor, "batch tokens"]
    target_mask: Bool[Tensor, "batch tokens"]
    indices: tuple[int, ...]


def make_batch(
    examples: Sequence[TokenizedExample], indices: Sequence[int], *, device: torch.device | str = "cpu", pad_to: int = 0
) -> Batch:
    """Pad the examples at `indices` to the longest of them, or to `pad_to` tokens if that is longer."""
    selected = [examples[index] for index in indices]
    width = max(pad_to, *(len(example.token_ids) for example in selected))
    token_ids = np.zeros((len(selected), width), dtype=np.int64)
    target_mask = np.zeros((len(selected), width), dtype=bool)
    for row, example in enumerate(selected):
        token_ids[row, : len(example.token_ids)] = example.token_ids
        target_mask[row, : len(example.token_ids)] = example.target_mask
    return Batch(
        token_ids=torch.from_numpy(token_ids).to(device),
        target_mask=torch.from_numpy(target_mask).to(device),
        indices=tuple(indices),
    )


def check_token_ids(examples: Iterable[TokenizedExample], vocabulary: int, tokenizer: Any) -> None:
    """Raise if a token of an example has no embedding.

    Only tokens that occur are checked: a tokenizer may have more tokens than the model, as long as
    no text has them.

    Args:
        examples: The examples; queries, too.
        vocabulary: Number of tokens of the model; ids are below it.
        tokenizer: The tokenizer, which names the token in the message.

    Raises:
        ModelError: A token's id is out of range; the message names the example and the token.
    """
    for example in examples:
        ids = example.token_ids
        if len(ids) and (int(ids.max()) >= vocabulary or int(ids.min()) < 0):
            wrong = int(ids[(ids >= vocabulary) | (ids < 0)][0])
            raise missing_embedding(example.example_id, wrong, vocabulary, tokenizer)


def missing_embedding(name: str, token_id: int, vocabulary: int, tokenizer: Any) -> ModelError:
    """The error for a token that has no embedding, in the example or prompt of a name."""
    try:
        token, size = tokenizer.convert_ids_to_tokens(token_id), len(tokenizer)
    except Exception:  # a tokenizer's own, for an id that it does not have either
        token, size = None, None
    shown = "" if token is None else f' ("{one_line(token, 40)}")'
    sizes = "" if size is None else f", and the tokenizer {size}"
    return ModelError(
        f"{one_line(name)}: token {token_id}{shown} has no embedding: the model has {vocabulary} tokens{sizes}; "
        "expected the tokenizer that the model was trained with; if tokens were added to it, call "
        "`resize_token_embeddings` of the model, train it and save it again"
    )


def plan_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Group examples of similar length so that no padded batch exceeds `batch_tokens`.

    The longest examples come first, so that memory runs out at once or not at all. An example longer
    than `batch_tokens` is a batch by itself.

    Args:
        lengths: Number of tokens of each example.
        batch_tokens: Most tokens per batch, padding included.

    Returns:
        Indices of each batch's examples.

    Raises:
        OptionError: `batch_tokens` is below 1.
    """
    check_at_least("batch_tokens", batch_tokens)
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    batches: list[list[int]] = []
    for index in order:
        # Lengths descend, so a batch is as wide as its first example.
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def run_adaptively(
    batches: Sequence[list[int]], run: Callable[[list[int]], Result], note: Callable[[str], None]
) -> Iterator[tuple[list[int], Result]]:
    """Run every batch; halve a batch that does not fit in memory, and limit later ones to that size.

    Args:
        batches: Indices of each batch's examples.
        run: Callback that computes one batch's result from its indices.
        note: Callback that receives a line each time that batches become smaller.

    Yields:
        The indices of a batch that ran, and its result.

    Raises:
        OptionError: A single example does not fit in memory.
    """
    pending = list(reversed(batches))
    most: int | None = None
    while pending:
        indices = pending.pop()
        if most is not None and len(indices) > most:
            pending += [indices[most:], indices[:most]]
            continue
        try:
            result = run(indices)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if len(indices) == 1:
                raise OptionError(
                    "one example alone does not fit in memory; expected room for its activations; "
                    'shorten windows with `window_tokens`, load the model with `dtype="bfloat16"`, or use a larger '
                    "machine"
                ) from None
            most = (len(indices) + 1) // 2
            note(f"memory ran out at {len(indices)} examples per batch; continuing with at most {most}")
            pending.append(indices)
            result = None
        if result is None:
            # Outside the except block, where the traceback no longer holds the failed pass's tensors.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        yield indices, result


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return "can't allocate memory" in str(error) or "out of memory" in str(error).lower()
