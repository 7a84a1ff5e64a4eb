"""The tokenized corpus in memory, and the order of its batches, which is a function of the seed alone."""

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
    """All windows of the corpus, one after the other, in five bytes per token.

    Attributes:
        token_ids: The windows' tokens.
        target_mask: Whether each token is predicted.
        offsets: The first token of each window, and the end of the last.
        skipped: Number of records without a token to predict.
    """

    token_ids: Int32[np.ndarray, "tokens"]
    target_mask: Bool[np.ndarray, "tokens"]
    offsets: Int64[np.ndarray, "bounds"]
    skipped: int

    @property
    def lengths(self) -> Int64[np.ndarray, "windows"]:
        """Number of tokens of each window."""
        return np.diff(self.offsets)

    def batch(self, indices: Sequence[int], *, device: torch.device | str = "cpu") -> Batch:
        """The windows at `indices`, padded on the right to the longest of them."""
        width = max(int(self.offsets[index + 1] - self.offsets[index]) for index in indices)
        token_ids = np.zeros((len(indices), width), dtype=np.int64)
        target_mask = np.zeros((len(indices), width), dtype=bool)
        for row, index in enumerate(indices):
            window = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
            token_ids[row, : window.stop - window.start] = self.token_ids[window]
            target_mask[row, : window.stop - window.start] = self.target_mask[window]
        return Batch(
            token_ids=torch.from_numpy(token_ids).to(device),
            target_mask=torch.from_numpy(target_mask).to(device),
            indices=tuple(indices),
        )


def tokenize_corpus(corpus: Corpus, tokenizer: Any, *, window_tokens: int) -> TokenizedCorpus:
    """Tokenize the whole corpus as `build_index` does.

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
    """One epoch: each window in exactly one batch, in an order that depends on seed and epoch alone.

    Windows are divided at random into pools, sorted by length within each pool, and grouped into
    batches of at most `batch_tokens`; then the batches of all pools are shuffled.

    Returns:
        Indices of each batch's windows.
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    batches: list[list[int]] = []
    for start in range(0, len(order), pool_examples):
        pool = order[start : start + pool_examples]
        batches.extend(pool[indices].tolist() for indices in plan_batches(lengths[pool].tolist(), batch_tokens))
    return [batches[number] for number in generator.permutation(len(batches))]


def batches_from(
    lengths: Int64[np.ndarray, "windows"], epoch: int, batch: int, *, batch_tokens: int, pool_examples: int, seed: int
) -> Iterator[tuple[int, int, list[int]]]:
    """Yield epoch, number in it and window indices of each batch, from the given one on, without end."""
    while True:
        batches = epoch_batches(lengths, batch_tokens=batch_tokens, pool_examples=pool_examples, seed=seed, epoch=epoch)
        for number in range(batch, len(batches)):
            yield epoch, number, batches[number]
        epoch, batch = epoch + 1, 0
