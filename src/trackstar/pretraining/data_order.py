"""The tokenized corpus in memory, and the order in which its batches are read: a function of the seed alone."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int32, Int64

from trackstar.corpus import Corpus, tokenize_examples
from trackstar.errors import PretrainingError
from trackstar.model.batching import Batch, plan_batches


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenizedCorpus:
    """Every window of the corpus, one after the other: five bytes a token.

    Attributes:
        token_ids: The windows' tokens.
        target_mask: Which of them are predicted.
        offsets: Where each window begins, and where the last ends: one more than there are windows.
        skipped: Records without a token to predict.
    """

    token_ids: Int32[np.ndarray, "tokens"]
    target_mask: Bool[np.ndarray, "tokens"]
    offsets: Int64[np.ndarray, "bounds"]
    skipped: int

    @property
    def lengths(self) -> Int64[np.ndarray, "windows"]:
        """Tokens of each window."""
        return np.diff(self.offsets)

    def batch(self, places: Sequence[int], *, device: torch.device | str = "cpu") -> Batch:
        """The windows at `places`, padded on the right to the longest of them."""
        width = max(int(self.offsets[place + 1] - self.offsets[place]) for place in places)
        token_ids = np.zeros((len(places), width), dtype=np.int64)
        target_mask = np.zeros((len(places), width), dtype=bool)
        for row, place in enumerate(places):
            window = slice(int(self.offsets[place]), int(self.offsets[place + 1]))
            token_ids[row, : window.stop - window.start] = self.token_ids[window]
            target_mask[row, : window.stop - window.start] = self.target_mask[window]
        return Batch(
            token_ids=torch.from_numpy(token_ids).to(device),
            target_mask=torch.from_numpy(target_mask).to(device),
            places=tuple(places),
        )


def tokenize_corpus(corpus: Corpus, tokenizer: Any, *, window_tokens: int) -> TokenizedCorpus:
    """Tokenize the whole corpus as the indexer will.

    Raises:
        PretrainingError: No record has a token to predict.
        CorpusError: A record cannot be read or tokenized.
    """
    token_ids: list[np.ndarray] = []
    target_mask: list[np.ndarray] = []
    skipped = 0
    for windows in tokenize_examples(corpus.examples(), tokenizer, window_tokens=window_tokens):
        skipped += not windows
        token_ids.extend(window.token_ids for window in windows)
        target_mask.extend(window.target_mask for window in windows)
    if not token_ids:
        raise PretrainingError(f"{corpus.name}: no record has a token to predict; expected texts of a token or more")
    return TokenizedCorpus(
        token_ids=np.concatenate(token_ids),
        target_mask=np.concatenate(target_mask),
        offsets=np.concatenate([[0], np.cumsum([len(ids) for ids in token_ids])]).astype(np.int64),
        skipped=skipped,
    )


def epoch_batches(
    lengths: Int64[np.ndarray, "windows"], *, batch_tokens: int, pool_examples: int, seed: int, epoch: int
) -> list[list[int]]:
    """One epoch: every window in exactly one batch, in an order made from the seed and the epoch's number alone.

    Windows are dealt at random into pools, sorted by length within a pool, cut into batches of the token budget, and
    the batches of all pools are shuffled.

    Returns:
        Places of each batch's windows.
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    batches: list[list[int]] = []
    for start in range(0, len(order), pool_examples):
        pool = order[start : start + pool_examples]
        batches.extend(pool[places].tolist() for places in plan_batches(lengths[pool].tolist(), batch_tokens))
    return [batches[place] for place in generator.permutation(len(batches))]


def batches_from(
    lengths: Int64[np.ndarray, "windows"], epoch: int, batch: int, *, batch_tokens: int, pool_examples: int, seed: int
) -> Iterator[tuple[int, int, list[int]]]:
    """Epoch, number in it and places of every batch from the given one on, without end."""
    while True:
        batches = epoch_batches(lengths, batch_tokens=batch_tokens, pool_examples=pool_examples, seed=seed, epoch=epoch)
        for number in range(batch, len(batches)):
            yield epoch, number, batches[number]
        epoch, batch = epoch + 1, 0
