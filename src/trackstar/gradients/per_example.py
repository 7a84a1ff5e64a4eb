"""Per-example loss gradients as factors: G = Σ_t g_t a_tᵀ, never materialised here.

For a matrix W with outputs y_t = W a_t, an example's loss gradient is the sum over token positions of the outer
product of g_t = ∂Loss/∂y_t and a_t. Forward hooks hand each matrix's inputs to a consumer, backward hooks its
outputs' gradients; the consumer sums what it wants of them. Only activations' gradients are computed: all weights are
frozen and the graph starts at the first matrices' outputs.

The head's part is taken in closed form, for the loss (softmax - one-hot)·W, over chunks of target positions, so that no
tensor of vocabulary size exists for the whole batch.

What is differentiated is the loss; TRAK's margin and the logit are there to be compared with it (paper, Table A.3).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trackstar.choices import Output
from trackstar.model.batching import Batch
from trackstar.model.language_model import Head, LanguageModel
from trackstar.model.layer_blocks import WeightMatrix

# Logits of a chunk of positions take about this many bytes: small enough to stay in a last-level cache, large enough
# for an efficient matrix product.
_CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 512 << 20}


@runtime_checkable
class GradientConsumer(Protocol):
    """What is done with the factors of every matrix's gradients."""

    def start(self, examples: int) -> None:
        """A batch of that many examples begins."""
        ...

    def keep(self, matrix: WeightMatrix, inputs: Float[Tensor, "batch tokens columns"]) -> Any:
        """Called in the forward pass: returns what `add` will need of the matrix's inputs a."""
        ...

    def add(self, matrix: WeightMatrix, kept: Any, gradients: Float[Tensor, "batch tokens rows"]) -> None:
        """Called in the backward pass with the gradients g of the loss by the matrix's outputs; zero on padding."""
        ...


@contextmanager
def gradient_pass(
    model: LanguageModel, consumer: GradientConsumer, *, output: Output = "loss"
) -> Iterator[Callable[[Batch], Float[Tensor, "batch"]]]:
    """Hook the model's matrices; inside, call the yielded function with a batch to run forward and backward.

    The function returns each example's loss: the sum of its target tokens' cross-entropies, in nats (paper, §3). The
    gradients are those of `output`.
    """
    handles = [
        model.module.get_submodule(matrix.name).register_forward_hook(_forward_hook(matrix, consumer))
        for matrix in model.matrices
    ]

    def run(batch: Batch) -> Float[Tensor, "batch"]:
        consumer.start(batch.token_ids.shape[0])
        with torch.enable_grad():
            hidden = model.hidden_states(model.embeddings(batch.token_ids))
        losses, hidden_gradients = loss_and_hidden_gradients(
            model.head, hidden.detach(), batch.token_ids, batch.target_mask, output=output
        )
        hidden.backward(hidden_gradients)
        return losses

    try:
        yield run
    finally:
        for handle in handles:
            handle.remove()


def _forward_hook(matrix: WeightMatrix, consumer: GradientConsumer) -> Callable[..., Tensor | None]:
    def forward(_module: Any, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        kept = consumer.keep(matrix, arguments[0].detach())
        starts_graph = not output.requires_grad
        if starts_graph:
            output.requires_grad_(True)
        output.register_hook(lambda gradients: consumer.add(matrix, kept, gradients))
        # A leaf of the graph must not be changed in place, as OLMo does when it clips; a copy of it may.
        return output.clone() if starts_graph else None

    return forward


@torch.no_grad()
def loss_and_hidden_gradients(
    head: Head,
    hidden: Float[Tensor, "batch tokens width"],
    token_ids: Int[Tensor, "batch tokens"],
    target_mask: Bool[Tensor, "batch tokens"],
    *,
    output: Output = "loss",
) -> tuple[Float[Tensor, "batch"], Float[Tensor, "batch tokens width"]]:
    """Summed cross-entropies, and the gradients of `output` by the head's inputs, in closed form.

    The token at position t + 1 is predicted from the hidden state at t. With logits z and the target y,

        loss    ∂CE/∂z = softmax(z) - onehot(y)
        margin  log(p/(1-p)) = z_y - logsumexp of the others: onehot(y) - softmax of the others (Park et al. 2023)
        logit   onehot(y)

    A soft cap c multiplies each by 1 - (z/c)².

    Returns:
        Each example's loss in nats, in float32, and the gradients by `hidden`, in its dtype.
    """
    example, position = target_mask[:, 1:].nonzero(as_tuple=True)
    states = hidden[example, position]
    targets = token_ids[example, position + 1]
    losses = torch.zeros(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    gradients = torch.zeros_like(hidden)
    vocabulary = head.weight.shape[0]
    chunk = max(16, _CHUNK_BYTES.get(hidden.device.type, 64 << 20) // (4 * vocabulary))
    for start in range(0, len(targets), chunk):
        part = slice(start, start + chunk)
        cross_entropies, by_states = _output_gradient(head, states[part], targets[part], output)
        losses.index_add_(0, example[part], cross_entropies)
        gradients[example[part], position[part]] = by_states
    return losses, gradients


def _output_gradient(
    head: Head, states: Float[Tensor, "positions width"], targets: Int[Tensor, "positions"], output: Output
) -> tuple[Float[Tensor, "positions"], Float[Tensor, "positions width"]]:
    logits = head.logits(states).float()
    rows = torch.arange(len(targets), device=targets.device)
    cap_slope = None if head.cap is None else 1 - (logits / head.cap).square()
    if output == "loss":
        log_probabilities = torch.log_softmax(logits, dim=-1, out=logits)
        cross_entropies = -log_probabilities[rows, targets]
        by_logits = log_probabilities.exp_()
        by_logits[rows, targets] -= 1.0
    else:
        cross_entropies = torch.logsumexp(logits, dim=-1) - logits[rows, targets]
        if output == "margin":
            logits[rows, targets] = -torch.inf
            by_logits = torch.softmax(logits, dim=-1).neg_()
        else:
            by_logits = torch.zeros_like(logits)
        by_logits[rows, targets] = 1.0
    if cap_slope is not None:
        by_logits *= cap_slope
    by_states = by_logits.to(states.dtype) @ head.weight
    return cross_entropies, by_states if head.scale == 1.0 else by_states * head.scale
