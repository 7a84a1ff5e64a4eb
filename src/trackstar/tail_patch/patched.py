"""One training step a proponent as adapters, and a forward pass in which every row of a batch has its proponent's.

    linear layer    y = W a + b + B (A a) + δb       ΔW = B A of rank S - 1 (Adafactor's update, `adafactor`)
    norm            y = (w + δw)∘x̂ + b + δb
    table           y = E[token] + ΔE[token]
    head            z = h Wᵀ + b + h ΔWᵀ + δb

No weight is copied or changed; rows with the same proponent are multiplied with its factors together.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from trackstar.model.batching import Batch
from trackstar.model.language_model import LanguageModel
from trackstar.tail_patch.adafactor import ParameterStep, TableUpdate, low_rank_update, table_update, vector_update
from trackstar.tail_patch.backbone import row_backbone
from trackstar.tail_patch.factors import GradientFactors
from trackstar.tail_patch.layout import Layout, LinearPlace, TablePlace
from trackstar.tail_patch.probabilities import log_probabilities, shifted


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Adapters:
    """What one training step on each of some proponents changes.

    Attributes:
        linears: A and B of each linear layer, by path: the change of its outputs is (a Aᵀ) B.
        vectors: Changes of norms' weights and of all biases, by name.
        tables: Changes of tables and of the head's weight, by name, a table a proponent.
    """

    linears: dict[str, tuple[Float[Tensor, "proponents positions _"], Float[Tensor, "proponents positions _"]]]
    vectors: dict[str, Float[Tensor, "proponents _"]]
    tables: dict[str, list[TableUpdate]]


@torch.no_grad()
def make_adapters(layout: Layout, steps: dict[str, ParameterStep], factors: GradientFactors) -> Adapters:
    """The step of every parameter, from the factors of its gradient; uses the factors up."""
    linears: dict[str, tuple[Tensor, Tensor]] = {}
    for place in layout.linears:
        if place.weight is None:
            continue
        inputs, gradients = factors.linears.pop(place.path)
        if place.transposed:
            linears[place.path] = low_rank_update(steps[place.weight], inputs, gradients)
        else:
            up, down = low_rank_update(steps[place.weight], gradients, inputs)
            linears[place.path] = (down, up)
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
    """log p of each row's targets after the step on the row's own proponent, in nats.

    Args:
        model: The model.
        layout: Where the parameters that the step moves take part.
        adapters: What the steps change.
        batch: Queries.
        owners: For each row, its proponent's place among the adapters', ascending.
    """
    token_ids, targets, counts = shifted(batch)
    patch = _Patch(layout, adapters, owners, model.device)
    vectors = {
        name: patch.vector(name, layout.parameters[name])
        for place in layout.norms
        for name in (place.weight, place.bias)
        if name is not None
    }
    with row_backbone(model, layout, vectors, on_linear=patch.on_linear, on_table=patch.on_table) as run:
        embeddings = model.embeddings(token_ids)
        if layout.tokens is not None:
            embeddings = patch.on_table(layout.tokens, token_ids, embeddings)
        hidden = run(embeddings)
    return log_probabilities(model.head, hidden, targets, counts, patch=patch.on_head)


class _Patch:
    """Adds each row's changes to what the modules give."""

    def __init__(self, layout: Layout, adapters: Adapters, owners: Sequence[int], device: Any) -> None:
        self._layout = layout
        self._adapters = adapters
        self._owners = torch.tensor(owners, device=device)
        # Consecutive rows of one proponent: its place, and which rows.
        self._runs: list[tuple[int, slice]] = []
        start = 0
        for owner, group in itertools.groupby(owners):
            stop = start + len(list(group))
            self._runs.append((owner, slice(start, stop)))
            start = stop

    def vector(self, name: str, own: Tensor) -> Tensor:
        """A vector with each row's change."""
        return own + self._adapters.vectors[name][self._owners]

    def on_linear(self, place: LinearPlace, inputs: Tensor, outputs: Tensor) -> None:
        if place.bias is not None:
            outputs += self._adapters.vectors[place.bias][self._owners][:, None]
        if place.weight is None:
            return
        down, up = self._adapters.linears[place.path]
        for owner, rows in self._runs:
            flat = outputs[rows].view(-1, outputs.shape[-1])
            flat.addmm_(inputs[rows].reshape(-1, inputs.shape[-1]) @ down[owner].T, up[owner])

    def on_table(self, place: TablePlace, ids: Tensor, found: Tensor) -> Tensor:
        ids = ids.expand(len(self._owners), -1)
        changed = found.expand(len(self._owners), *found.shape[1:]).clone()
        for owner, rows in self._runs:
            change = self._adapters.tables[place.weight][owner].looked_up(ids[rows].reshape(-1))
            changed[rows] += place.scale * change.view_as(changed[rows])
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
