"""The gradient of each parameter that a training step moves, example by example, as factors.

    linear layer    G = Σ_t g_t a_tᵀ          g the gradient by the outputs, a the inputs; a bias: Σ_t g_t
    norm            Σ_t g_t ∘ x̂_t             by autograd: each row of the batch has a separate weight
    table           Σ_t onehot(token_t) g_tᵀ  rows of the example's own tokens only
    head            Σ_t d_t h_tᵀ              d = (softmax - onehot) ∘ cap's slope · scale, by h Wᵀ + b

The last token of an example is never an input, so S tokens give S - 1 factors.
"""

import dataclasses

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trackstar.model.batching import Batch
from trackstar.model.completion_probabilities import position_chunks, shifted
from trackstar.model.language_model import LanguageModel
from trackstar.tail_patch.backbone import row_backbone
from trackstar.tail_patch.layout import EmbeddingTable, Layout, LinearLayer


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GradientFactors:
    """Gradients of a batch of examples; gradients of padding are zero.

    Attributes:
        losses: Each example's loss in nats: the mean or the sum over its targets.
        linears: Inputs a, and gradients g by the outputs, of each layer whose weight moves, by the
            layer's path.
        vectors: Gradients of norms' weights and biases, and of linear layers' and the head's biases, by name.
        tables: Ids that were looked up, and gradients by their embeddings, by the table's name.
        head: d and h of the head's weight if it moves, else None.
    """

    losses: Float[Tensor, "batch"]
    linears: dict[str, tuple[Tensor, Tensor]]
    vectors: dict[str, Float[Tensor, "batch _"]]
    tables: dict[str, tuple[Int[Tensor, "batch positions"], Float[Tensor, "batch positions _"]]]
    head: tuple[Float[Tensor, "batch positions _"], Float[Tensor, "batch positions _"]] | None


class _Recorder:
    """Records the factors of the gradients while a batch of `rows` examples runs forward and backward."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self.inputs: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self.lookups: dict[str, tuple[Tensor, Tensor]] = {}

    def on_linear(self, layer: LinearLayer, inputs: Tensor, outputs: Tensor) -> None:
        if layer.weight is not None:
            self.inputs[layer.path] = inputs.detach()
        outputs.register_hook(lambda gradients: self.gradients.__setitem__(layer.path, gradients))

    def on_table(self, table: EmbeddingTable, ids: Tensor, embeddings: Tensor) -> Tensor:
        """The same embeddings for each row of the batch, as leaves with separate gradients."""
        leaf = embeddings.detach().expand(self._rows, *embeddings.shape[1:]).clone().requires_grad_()
        self.lookups[table.weight] = (ids.expand(self._rows, -1), leaf)
        return leaf


def gradient_factors(model: LanguageModel, layout: Layout, batch: Batch, *, mean: bool) -> GradientFactors:
    """The gradient of each example's own loss.

    Args:
        model: The model, its weights frozen.
        layout: The modules of the parameters to differentiate by.
        batch: The examples.
        mean: Whether the loss is the mean over an example's targets; if not, it is their sum.
    """
    token_ids, targets, counts = shifted(batch)
    rows = len(token_ids)
    leaves = {
        name: layout.parameters[name].detach().expand(rows, -1).clone().requires_grad_()
        for norm in layout.norms
        for name in (norm.weight, norm.bias)
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
    for layer in layout.linears:
        gradients = recorder.gradients.pop(layer.path)
        if layer.bias is not None:
            vectors[layer.bias] = gradients.sum(dim=1)
        if layer.weight is not None:
            linears[layer.path] = (recorder.inputs.pop(layer.path), gradients)
    if layout.head_bias is not None and by_linear is not None:
        vectors[layout.head_bias] = by_linear.sum(dim=1)
    tables = {table.weight: _looked_up(table, *recorder.lookups[table.weight]) for table in layout.positions}
    if layout.tokens is not None:
        tables[layout.tokens.weight] = _looked_up(layout.tokens, token_ids.to(embeddings.device), embeddings)
    head = (by_linear, states) if layout.head_weight is not None and by_linear is not None else None
    return GradientFactors(losses=losses, linears=linears, vectors=vectors, tables=tables, head=head)


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _looked_up(table: EmbeddingTable, ids: Tensor, leaf: Tensor) -> tuple[Tensor, Tensor]:
    """The ids, and the gradients by the table's entries; the padding entry has none, as in torch."""
    gradients = _gradient(leaf) * table.scale
    if table.padding_id is not None:
        gradients = gradients.masked_fill((ids == table.padding_id)[..., None], 0)
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
    """Losses, gradients by the hidden states and, if the head moves, by h Wᵀ + b; chunk by chunk."""
    head = model.head
    losses = hidden.new_zeros(len(hidden))
    by_states = torch.zeros_like(hidden)
    moves = layout.head_weight is not None or layout.head_bias is not None
    by_linear = hidden.new_zeros(*hidden.shape[:2], len(head.weight)) if moves else None
    rows, positions = counts.nonzero(as_tuple=True)
    for part in position_chunks(len(rows), head, hidden.dtype):
        row, position = rows[part], positions[part]
        numbers, target = torch.arange(len(row), device=row.device), targets[row, position]
        logits = head.logits(hidden[row, position])  # [positions, vocabulary]
        # ∂z/∂(h Wᵀ + b) = scale · (1 - (z/cap)²)
        slope = head.scale if head.cap is None else head.scale * (1 - (logits / head.cap).square())
        log_probabilities = torch.log_softmax(logits, dim=-1, out=logits)
        losses.index_add_(0, row, -log_probabilities[numbers, target] / divisors[row])
        # ∂CE/∂z = softmax(z) - onehot(target)
        gradients = log_probabilities.exp_()
        gradients[numbers, target] -= 1.0
        gradients.mul_(slope / divisors[row, None])
        by_states[row, position] = gradients @ head.weight
        if by_linear is not None:
            by_linear[row, position] = gradients
    return losses, by_states, by_linear
