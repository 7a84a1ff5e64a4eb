"""Log-probabilities of completions, from hidden states.

    log p(completion | prompt) = Σ over the completion's tokens of log softmax(z)[token]
    z = cap·tanh(scale·(h Wᵀ + b)/cap), or z = scale·(h Wᵀ + b) without a cap

The token at position t + 1 is predicted from the hidden state at t, so the last token of a sequence
is never an input.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor, nn

from trackstar.corpus import TokenizedExample
from trackstar.model.batching import Batch, make_batch, plan_batches
from trackstar.model.devices import float64_device, in_float64
from trackstar.model.language_model import Head, LanguageModel

# Bytes that the logits of a chunk of positions take.
CHUNK_BYTES = 32 << 20

HeadPatch = Callable[[Tensor, Tensor, Tensor], None]
"""Called with h Wᵀ + b of some positions, their states h and their rows of the batch; changes the first."""


def shifted(
    batch: Batch,
) -> tuple[Int[Tensor, "batch positions"], Int[Tensor, "batch positions"], Bool[Tensor, "batch positions"]]:
    """Inputs, the token that each position predicts, and whether it is a target; one fewer than tokens."""
    return batch.token_ids[:, :-1], batch.token_ids[:, 1:], batch.target_mask[:, 1:]


def bounded_logits(head: Head, linear: Float[Tensor, "positions vocabulary"]) -> Float[Tensor, "positions vocabulary"]:
    """z from h Wᵀ + b: scaled and capped, in float32 or more."""
    logits = linear if head.scale == 1.0 else linear * head.scale
    if head.cap is not None:
        logits = torch.tanh(logits / head.cap) * head.cap
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def position_chunks(positions: int, head: Head, dtype: torch.dtype) -> Iterator[slice]:
    """Slices of the positions, whose logits take about `CHUNK_BYTES` each."""
    size = max(16, CHUNK_BYTES // (dtype.itemsize * len(head.weight)))
    for start in range(0, positions, size):
        yield slice(start, start + size)


def log_probabilities(
    head: Head,
    hidden: Float[Tensor, "batch positions width"],
    targets: Int[Tensor, "batch positions"],
    counts: Bool[Tensor, "batch positions"],
    *,
    patch: HeadPatch | None = None,
) -> Float64[Tensor, "batch"]:
    """Each row's log-probability of its targets, in nats.

    Args:
        head: The output head.
        hidden: The head's inputs.
        targets: The token that each position predicts.
        counts: Whether that token is a target.
        patch: Changes the head's linear part; None leaves it.
    """
    rows, positions = counts.nonzero(as_tuple=True)
    totals = torch.zeros(hidden.shape[0], dtype=torch.float64, device=float64_device(hidden.device))
    for part in position_chunks(len(rows), head, hidden.dtype):
        row, position = rows[part], positions[part]
        states = hidden[row, position]
        linear = nn.functional.linear(states, head.weight, head.bias)
        if patch is not None:
            patch(linear, states, row)
        logits = bounded_logits(head, linear)
        of_target = logits.gather(1, targets[row, position][:, None])[:, 0]
        totals.index_add_(0, row.to(totals.device), in_float64(of_target - logits.logsumexp(dim=-1)))
    return totals


@torch.no_grad()
def measured_log_probabilities(
    model: LanguageModel, queries: Sequence[TokenizedExample], *, batch_tokens: int
) -> Float64[np.ndarray, "queries"]:
    """log p(completion | prompt) of each query under the model's current weights, in nats."""
    measured = np.zeros(len(queries))
    for indices in plan_batches([len(query.token_ids) for query in queries], model.batch_budget(batch_tokens)):
        batch = make_batch(queries, indices, device=model.device)
        _, targets, counts = shifted(batch)
        hidden = model.hidden_states(batch.token_ids[:, :-1])
        measured[indices] = log_probabilities(model.head, hidden, targets, counts).cpu().numpy()
    return measured
