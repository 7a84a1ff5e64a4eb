"""One training step per proponent as adapters, and a forward pass with each row's proponent's adapters.

    linear layer    y = W a + b + B (A a) + δb       ΔW = B A of rank at most S - 1 (see `adafactor`)
    norm            y = (w + δw)∘x̂ + b + δb
    table           y = E[token] + ΔE[token]
    head            z = h Wᵀ + b + h ΔWᵀ + δb

Of an example with S tokens, S - 1 are inputs, so G = Σ_t g_t a_tᵀ has at most S - 1 terms.
Adafactor rescales rows and columns, which keeps the rank: ΔW = Σ_t ĝ_t â_tᵀ = B A with B = ĝᵀ of
shape [rows, S - 1] and A = â of shape [S - 1, columns], and ΔW a = B (A a) costs (S - 1)(rows +
columns) per position instead of rows · columns.

No weight is copied or changed. Rows with the same proponent are multiplied with its factors together.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from trackstar.model.batching import Batch
from trackstar.model.completion_probabilities import log_probabilities, shifted
from trackstar.model.language_model import LanguageModel
from trackstar.tail_patch.adafactor import ParameterStep, TableUpdate, low_rank_update, table_update, vector_update
from trackstar.tail_patch.backbone import row_backbone
from trackstar.tail_patch.factors import GradientFactors
from trackstar.tail_patch.layout import EmbeddingTable, Layout, LinearLayer


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Adapters:
    """The changes that one training step on each of some proponents makes.

    Attributes:
        linears: A and Bᵀ of each linear layer, by its path: the change of its outputs is (a Aᵀ) Bᵀ.
        vectors: Changes of norms' weights and of all biases, by name.
        tables: Changes of tables and of the head's weight, by name, one per proponent.
    """

    linears: dict[str, tuple[Float[Tensor, "proponents positions _"], Float[Tensor, "proponents positions _"]]]
    vectors: dict[str, Float[Tensor, "proponents _"]]
    tables: dict[str, list[TableUpdate]]


@torch.no_grad()
def make_adapters(layout: Layout, steps: dict[str, ParameterStep], factors: GradientFactors) -> Adapters:
    """The step of each parameter, from its gradient's factors; empties `factors.linears` to save memory."""
    linears: dict[str, tuple[Tensor, Tensor]] = {}
    for layer in layout.linears:
        if layer.weight is None:
            continue
        inputs, gradients = factors.linears.pop(layer.path)
        if layer.transposed:
            linears[layer.path] = low_rank_update(steps[layer.weight], inputs, gradients)
        else:
            up, down = low_rank_update(steps[layer.weight], gradients, inputs)
            linears[layer.path] = (down, up)
    vectors = {name: vector_update(steps[name], gradients) for name, gradients in factors.vectors.items()}
    names = {*factors.tables, *([layout.head_weight] if layout.head_weight else [])}
    tables = {
        name: [_table(layout, steps[name], name, factors, row) for row in range(len(factors.losses))] for name in names
    }
    return Adapters(linears=linears, vectors=vectors, tables=tables)


def _table(layout: Layout, step: ParameterStep, name: str, factors: GradientFactors, row: int) -> TableUpdate:
    """The step of a table, a head, or one matrix that is both, by one example."""
    parameter = layout.parameters[name]
    ids = torch.zeros(0, dtype=torch.int64, device=parameter.device)
    rows = parameter.new_zeros(0, parameter.shape[1])
    if name in factors.tables:
        looked_up, gradients = (part[row] for part in factors.tables[name])
        ids, inverse = looked_up.unique(return_inverse=True)
        rows = parameter.new_zeros(len(ids), parameter.shape[1]).index_add_(0, inverse, gradients)
    if name == layout.head_weight and factors.head is not None:
        return table_update(step, ids, rows, *(part[row] for part in factors.head))
    return table_update(step, ids, rows)


@torch.no_grad()
def patched_log_probabilities(
    model: LanguageModel, layout: Layout, adapters: Adapters, batch: Batch, owners: Sequence[int]
) -> Float64[Tensor, "batch"]:
    """log p of each row's targets after the step on the row's proponent, in nats.

    Args:
        model: The model.
        layout: The modules of the parameters that the step moves.
        adapters: The changes that the steps make.
        batch: Queries.
        owners: The proponent of each row, as its index in the adapters; ascending.
    """
    token_ids, targets, counts = shifted(batch)
    patch = _Patch(layout, adapters, owners, model.device)
    vectors = {
        name: patch.vector(name, layout.parameters[name])
        for norm in layout.norms
        for name in (norm.weight, norm.bias)
        if name is not None
    }
    with row_backbone(model, layout, vectors, on_linear=patch.on_linear, on_table=patch.on_table) as run:
        embeddings = model.embeddings(token_ids)
        if layout.tokens is not None:
            embeddings = patch.on_table(layout.tokens, token_ids.to(embeddings.device), embeddings)
        hidden = run(embeddings)
    return log_probabilities(model.head, hidden, targets, counts, patch=patch.on_head)


class _Patch:
    """Adds each row's changes to the outputs of the modules."""

    def __init__(self, layout: Layout, adapters: Adapters, owners: Sequence[int], device: Any) -> None:
        self._layout = layout
        self._adapters = adapters
        self._owners = torch.tensor(owners, device=device)
        # Runs of consecutive rows with one proponent: the proponent's index, and the rows.
        self._runs: list[tuple[int, slice]] = []
        start = 0
        for owner, group in itertools.groupby(owners):
            stop = start + len(list(group))
            self._runs.append((owner, slice(start, stop)))
            start = stop

    def vector(self, name: str, weights: Tensor) -> Tensor:
        """A vector plus each row's change."""
        return weights + self._by_row(name)

    def _by_row(self, name: str) -> Tensor:
        """Each row's change of a vector."""
        changes = self._adapters.vectors[name]
        return changes[self._owners.to(changes.device)]

    def on_linear(self, layer: LinearLayer, inputs: Tensor, outputs: Tensor) -> None:
        if layer.bias is not None:
            outputs += self._by_row(layer.bias)[:, None]
        if layer.weight is None:
            return
        down, up = self._adapters.linears[layer.path]
        for owner, rows in self._runs:
            flat = outputs[rows].view(-1, outputs.shape[-1])  # [rows · tokens, outputs]
            flat.addmm_(inputs[rows].reshape(-1, inputs.shape[-1]) @ down[owner].T, up[owner])

    def on_table(self, table: EmbeddingTable, ids: Tensor, embeddings: Tensor) -> Tensor:
        ids = ids.expand(len(self._owners), -1)
        changed = embeddings.expand(len(self._owners), *embeddings.shape[1:]).clone()
        for owner, rows in self._runs:
            change = self._adapters.tables[table.weight][owner].looked_up(ids[rows].reshape(-1))
            changed[rows] += table.scale * change.view_as(changed[rows])
        return changed

    def on_head(self, linear: Tensor, states: Tensor, rows: Tensor) -> None:
        owners = self._owners[rows]
        if self._layout.head_bias is not None:
            linear += self._adapters.vectors[self._layout.head_bias][owners]
        if self._layout.head_weight is None:
            return
        tables = self._adapters.tables[self._layout.head_weight]
        start = 0
        for owner, group in itertools.groupby(owners.tolist()):
            stop = start + len(list(group))
            tables[owner].add_to(linear[start:stop], states[start:stop])
            start = stop
