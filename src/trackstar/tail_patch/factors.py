"""The gradient of every parameter that a training step moves, example by example, as factors.

    linear layer    G = Σ_t g_t a_tᵀ          g the loss's gradient by the outputs, a the inputs; a bias: Σ_t g_t
    norm            Σ_t g_t ∘ x̂_t             by autograd: each row of the batch has a weight of its own
    table           Σ_t onehot(token_t) g_tᵀ  rows for the example's own tokens alone
    head            Σ_t d_t h_tᵀ              d = (softmax - onehot) ∘ cap's slope · scale, by h Wᵀ + b

The last token of an example is never read, so that S tokens make factors of S - 1.
"""

import dataclasses

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trackstar.model.batching import Batch
from trackstar.model.language_model import LanguageModel
from trackstar.tail_patch.backbone import row_backbone
from trackstar.tail_patch.layout import Layout, LinearPlace, TablePlace
from trackstar.tail_patch.probabilities import position_chunks, shifted


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GradientFactors:
    """The gradients of a batch of examples; positions beyond an example's own have zero gradients.

    Attributes:
        losses: Each example's loss in nats: the mean or the sum over its targets.
        linears: Inputs, and gradients by the outputs, of each layer whose weight moves, by its path.
        vectors: Gradients of norms' weights and biases, and of linear layers' and the head's biases, by name.
        tables: What was looked up, and the gradients by what was found, by the table's name.
        head: d and h of the head's weight, where it moves.
    """

    losses: Float[Tensor, "batch"]
    linears: dict[str, tuple[Tensor, Tensor]]
    vectors: dict[str, Float[Tensor, "batch _"]]
    tables: dict[str, tuple[Int[Tensor, "batch positions"], Float[Tensor, "batch positions _"]]]
    head: tuple[Float[Tensor, "batch positions _"], Float[Tensor, "batch positions _"]] | None


class _Recorder:
    """Keeps what the gradients are made of while a batch of so many rows runs forward and backward."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self.inputs: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self.lookups: dict[str, tuple[Tensor, Tensor]] = {}

    def on_linear(self, place: LinearPlace, inputs: Tensor, outputs: Tensor) -> None:
        if place.weight is not None:
            self.inputs[place.path] = inputs.detach()
        outputs.register_hook(lambda gradients: self.gradients.__setitem__(place.path, gradients))

    def on_table(self, place: TablePlace, ids: Tensor, found: Tensor) -> Tensor:
        """The same for every row of the batch, each with a gradient of its own."""
        leaf = found.detach().expand(self._rows, *found.shape[1:]).clone().requires_grad_()
        self.lookups[place.weight] = (ids.expand(self._rows, -1), leaf)
        return leaf


def gradient_factors(model: LanguageModel, layout: Layout, batch: Batch, *, mean: bool) -> GradientFactors:
    """Every example's gradient of its own loss.

    Args:
        model: The model, its weights frozen.
        layout: Where the parameters that are wanted take part.
        batch: The examples.
        mean: Whether the loss is the mean over an example's targets, or else their sum.
    """
    token_ids, targets, counts = shifted(batch)
    rows = len(token_ids)
    leaves = {
        name: layout.parameters[name].detach().expand(rows, -1).clone().requires_grad_()
        for place in layout.norms
        for name in (place.weight, place.bias)
        if name is not None
    }
    recorder = _Recorder(rows)
    with (
        torch.enable_grad(),
        row_backbone(model, layout, leaves, on_linear=recorder.on_linear, on_table=recorder.on_table) as run,
    ):
        embeddings = model.embeddings(token_ids).requires_grad_()
        hidden = run(embeddings)
        states = hidden.detach()
        divisors = counts.sum(dim=1) if mean else torch.ones_like(counts.sum(dim=1))
        losses, by_states, by_linear = _head_gradients(model, layout, states, targets, counts, divisors)
        hidden.backward(by_states)
    vectors = {name: _gradient(leaf) for name, leaf in leaves.items()}
    linears: dict[str, tuple[Tensor, Tensor]] = {}
    for place in layout.linears:
        gradients = recorder.gradients.pop(place.path)
        if place.bias is not None:
            vectors[place.bias] = gradients.sum(dim=1)
        if place.weight is not None:
            linears[place.path] = (recorder.inputs.pop(place.path), gradients)
    if layout.head_bias is not None and by_linear is not None:
        vectors[layout.head_bias] = by_linear.sum(dim=1)
    tables = {place.weight: _looked_up(place, *recorder.lookups[place.weight]) for place in layout.positions}
    if layout.tokens is not None:
        tables[layout.tokens.weight] = _looked_up(layout.tokens, token_ids, embeddings)
    head = (by_linear, states) if layout.head_weight is not None and by_linear is not None else None
    return GradientFactors(losses=losses, linears=linears, vectors=vectors, tables=tables, head=head)


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _looked_up(place: TablePlace, ids: Tensor, leaf: Tensor) -> tuple[Tensor, Tensor]:
    """The ids, and the gradients by the table's entries; an entry for padding has none, as in torch."""
    gradients = _gradient(leaf) * place.scale
    if place.padding_id is not None:
        gradients = gradients.masked_fill((ids == place.padding_id)[..., None], 0)
    return ids, gradients


@torch.no_grad()
def _head_gradients(
    model: LanguageModel,
    layout: Layout,
    hidden: Float[Tensor, "batch positions width"],
    targets: Int[Tensor, "batch positions"],
    counts: Bool[Tensor, "batch positions"],
    divisors: Int[Tensor, "batch"],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Losses, gradients by the hidden states and, where the head moves, by h Wᵀ + b; chunk by chunk."""
    head = model.head
    losses = hidden.new_zeros(len(hidden))
    by_states = torch.zeros_like(hidden)
    moves = layout.head_weight is not None or layout.head_bias is not None
    by_linear = hidden.new_zeros(*hidden.shape[:2], len(head.weight)) if moves else None
    rows, positions = counts.nonzero(as_tuple=True)
    for part in position_chunks(len(rows), head, hidden.dtype):
        row, position = rows[part], positions[part]
        places, chosen = torch.arange(len(row), device=row.device), targets[row, position]
        logits = head.logits(hidden[row, position])
        slope = head.scale if head.cap is None else head.scale * (1 - (logits / head.cap).square())
        log_probabilities = torch.log_softmax(logits, dim=-1, out=logits)
        losses.index_add_(0, row, -log_probabilities[places, chosen] / divisors[row])
        gradients = log_probabilities.exp_()
        gradients[places, chosen] -= 1.0
        gradients.mul_(slope / divisors[row, None])
        by_states[row, position] = gradients @ head.weight
        if by_linear is not None:
            by_linear[row, position] = gradients
    return losses, by_states, by_linear
