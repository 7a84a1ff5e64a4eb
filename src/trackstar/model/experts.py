"""Fused experts: the 3-D parameters in which a mixture-of-experts layer stores the matrices of its experts.

Transformers stores the matrices of a layer's experts in parameters of shape [experts, rows, columns] (or
[experts, columns, rows]) and computes with them through an interface that all these modules share
(`transformers.integrations.moe`). Each expert's slice is one weight matrix, named by its parameter and
its number: `model.layers.0.mlp.experts.down_proj.3`.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

_MARKS = ("is_transposed", "is_concatenated", "has_gate", "has_bias", "has_post_expert_norm", "num_experts")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExpertStack:
    """The matrices of all experts of a layer that play the same role, in one 3-D parameter.

    Attributes:
        module: Path of the experts' module.
        parameter: Name of the parameter in the model's state.
        experts: Number of experts.
        rows: Number of outputs of each expert's matrix.
        columns: Number of its inputs.
        transposed: Whether each slice is stored as [columns, rows].
    """

    module: str
    parameter: str
    experts: int
    rows: int
    columns: int
    transposed: bool

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the experts' matrices, in the order of the slices."""
        return tuple(f"{self.parameter}.{number}" for number in range(self.experts))


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds fused experts with the interface that Transformers' experts share."""
    return all(hasattr(module, mark) for mark in _MARKS) and getattr(module, "down_proj", None) is not None


def expert_stacks(module: nn.Module) -> Iterator[ExpertStack]:
    """The stacks of all fused experts in a model."""
    for path, child in module.named_modules():
        if not is_experts(child):
            continue
        experts: Any = child
        for key in ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj"):
            count, rows, columns = child.get_parameter(key).shape
            if experts.is_transposed:
                rows, columns = columns, rows
            yield ExpertStack(
                module=path,
                parameter=f"{path}.{key}",
                experts=count,
                rows=rows,
                columns=columns,
                transposed=experts.is_transposed,
            )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Routing:
    """Which token each expert reads: pairs of a token and one of its experts, sorted by expert.

    Attributes:
        batch: Number of examples.
        tokens: Number of tokens per example, padding included.
        choices: Number of experts per token.
        places: Number of each pair among tokens × choices; token t's pairs are t · choices and the
            next ones, with t counted over the examples one after the other.
        experts: Expert of each pair, ascending.
        bounds: First pair of each expert, and the number of pairs at the end.
    """

    batch: int
    tokens: int
    choices: int
    places: Int[Tensor, "pairs"]
    experts: Int[Tensor, "pairs"]
    bounds: tuple[int, ...]

    @property
    def token_rows(self) -> Int[Tensor, "pairs"]:
        """Number of each pair's token, counted over the examples one after the other."""
        return self.places // self.choices

    def hit(self) -> Iterator[tuple[int, slice]]:
        """The experts that read a token, and their pairs."""
        for number, (start, stop) in enumerate(zip(self.bounds, self.bounds[1:], strict=False)):
            if stop > start:
                yield number, slice(start, stop)

    def by_example(self, values: Float[Tensor, "pairs width"]) -> Float[Tensor, "batch slots width"]:
        """Values of the pairs of each example, token by token; zero for pairs that no expert reads."""
        spread = values.new_zeros(self.batch * self.tokens * self.choices, values.shape[-1])
        spread[self.places] = values
        return spread.view(self.batch, self.tokens * self.choices, -1)

    def slots(self, part: slice) -> "Slots":
        """Places of one expert's pairs in a batch padded to its largest number of pairs per example."""
        examples = self.token_rows[part] // self.tokens  # ascending, since pairs are sorted stably
        counts = torch.bincount(examples, minlength=self.batch)
        starts = counts.cumsum(0) - counts
        within = torch.arange(len(examples), device=examples.device) - starts[examples]
        return Slots(batch=self.batch, width=int(counts.max()), examples=examples, within=within)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Slots:
    """Places of an expert's pairs in a padded batch.

    Attributes:
        batch: Number of examples.
        width: Number of slots per example.
        examples: Example of each pair.
        within: Slot of each pair within its example.
    """

    batch: int
    width: int
    examples: Int[Tensor, "pairs"]
    within: Int[Tensor, "pairs"]

    def padded(self, values: Float[Tensor, "pairs width"]) -> Float[Tensor, "batch slots width"]:
        """The pairs' values example by example, with zeros in the slots that no pair has."""
        result = values.new_zeros(self.batch, self.width, values.shape[-1])
        result[self.examples, self.within] = values
        return result

    def gathered(self, values: Float[Tensor, "batch slots"]) -> Float[Tensor, "pairs"]:
        """The inverse of `padded` for one number per slot."""
        return values[self.examples, self.within]


def routed(indices: Int[Tensor, "rows choices"], *, experts: int, batch: int, tokens: int) -> Routing:
    """Sort the pairs of tokens and experts by expert; indices beyond the experts read nothing.

    Args:
        indices: The experts that each token is routed to.
        experts: Number of experts.
        batch: Number of examples.
        tokens: Number of tokens per example; the rows are the examples' tokens one after the other.
    """
    flat = indices.reshape(-1)
    ordered, places = torch.sort(flat, stable=True)
    counts = torch.bincount(flat.clamp(max=experts), minlength=experts + 1)[:experts].tolist()
    bounds = [0]
    for count in counts:
        bounds.append(bounds[-1] + count)
    return Routing(
        batch=batch,
        tokens=tokens,
        choices=indices.shape[-1],
        places=places[: bounds[-1]],
        experts=ordered[: bounds[-1]],
        bounds=tuple(bounds),
    )


Product = Callable[[str, Routing, Tensor, Tensor], Tensor]
"""Called with a stack's parameter key, the routing, and a product's inputs and outputs by pair.

Returns the outputs.
"""


def expert_outputs(
    module: nn.Module,
    hidden: Float[Tensor, "rows columns"],
    weights: Float[Tensor, "rows choices"],
    routing: Routing,
    on_product: Product = lambda _key, _routing, _inputs, outputs: outputs,
) -> Float[Tensor, "rows columns"]:
    """What fused experts compute, as the interface of `transformers.integrations.moe` defines it.

    Each pair of a token and an expert is one row of the two products; gates weigh the second's outputs.
    """
    experts: Any = module
    inputs = hidden[routing.token_rows]  # [pairs, columns]
    key = "gate_up_proj" if experts.has_gate else "up_proj"
    states = on_product(key, routing, inputs, _product(experts, key, inputs, routing))
    states = experts._apply_gate(states) if experts.has_gate else experts.act_fn(states)
    states = on_product("down_proj", routing, states, _product(experts, "down_proj", states, routing))
    if experts.has_post_expert_norm:
        states = experts.post_expert_norm(states)
    states = states * weights.reshape(-1)[routing.places, None]
    return torch.zeros_like(hidden).index_add(0, routing.token_rows, states.to(hidden.dtype))


def _product(experts: Any, key: str, inputs: Tensor, routing: Routing) -> Tensor:
    weight = getattr(experts, key)
    bias = getattr(experts, f"{key}_bias") if experts.has_bias else None
    parts = []
    for number, part in routing.hit():
        matrix = weight[number].T if experts.is_transposed else weight[number]
        parts.append(nn.functional.linear(inputs[part], matrix, None if bias is None else bias[number]))
    return torch.cat(parts)


def expert_arguments(
    hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, indices and weights of a call of experts, whatever a family names them."""
    return hidden, top_k_index, top_k_weights


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Replace a module's forward pass, and restore it."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
