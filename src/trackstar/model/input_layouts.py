"""Regroup what a linear layer reads by example and token, whatever the shape.

Most layers read [batch, tokens, columns]. Others flatten the batch and the tokens, add axes such as heads, or
swap the axes. The layout of a layer's input is found from a probe's shapes, and accepted if the values of
the tokens that two probes share agree there.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

# Ways to read one axis, as symbols from the slowest to the fastest: the batch, the tokens, and one more axis.
_READINGS = (
    ("b",), ("t",), ("b", "t"), ("t", "b"), ("k",), ("b", "k"), ("k", "b"), ("t", "k"), ("k", "t"),
    ("b", "t", "k"), ("b", "k", "t"),
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class InputLayout:
    """The meaning of the axes of a layer's inputs and outputs, without the last.

    Attributes:
        axes: For each axis, its symbols from the slowest to the fastest with the sizes of "k"; None
            if the rows cannot be assigned to examples, so that a batch must be one example.
    """

    axes: tuple[tuple[tuple[str, int], ...], ...] | None

    @property
    def is_flattened(self) -> bool:
        """Whether the rows are the examples' tokens, one example after the other."""
        return self.axes is not None and [[symbol for symbol, _ in axis] for axis in self.axes] == [["b", "t"]]

    def by_token(self, tensor: Tensor, batch: int, tokens: int) -> Tensor:
        """[batch, tokens · k, width]: the k rows of a token are neighbours."""
        if self.axes is None:
            return tensor.reshape(1, -1, tensor.shape[-1])
        flat = list(itertools.chain.from_iterable(self.axes))
        sizes = [{"b": batch, "t": tokens}.get(symbol, size) for symbol, size in flat]
        symbols = [symbol for symbol, _ in flat]
        order = [symbols.index("b"), symbols.index("t")]
        order += [place for place, symbol in enumerate(symbols) if symbol == "k"]
        split = tensor.reshape(*sizes, tensor.shape[-1]).permute(*order, len(sizes))
        return split.reshape(batch, -1, tensor.shape[-1])


FLAT = InputLayout(axes=None)


def find_layout(first: Tensor, second: Tensor, *, batch: int, tokens: int, shared: int) -> InputLayout | None:
    """The layout of a layer's input, from two probes of the same shape.

    The first example of both probes begins with the same `shared` tokens; all other tokens differ.

    Returns:
        None for the usual [batch, tokens, columns]; `FLAT` if no layout agrees with the values.
    """
    lead = tuple(first.shape[:-1])
    if lead == (batch, tokens):
        return None
    if first.shape == second.shape:
        for axes in _candidates(lead, batch, tokens):
            layout = InputLayout(axes=axes)
            one, other = (layout.by_token(t, batch, tokens).unflatten(1, (tokens, -1)) for t in (first, second))
            same = _close(one[0, :shared], other[0, :shared])
            if same and not _close(one[1], other[1]) and not _close(one[0, shared:], other[0, shared:]):
                return layout
    return FLAT


def _close(first: Tensor, second: Tensor) -> bool:
    scale = float(first.abs().max()) if first.numel() else 0.0
    tolerance = 1e-4 if first.dtype in (torch.float32, torch.float64) else 2e-2
    return torch.allclose(first.float(), second.float(), rtol=tolerance, atol=tolerance * scale)


def _candidates(lead: tuple[int, ...], batch: int, tokens: int) -> Iterator[tuple[tuple[tuple[str, int], ...], ...]]:
    sizes = {"b": batch, "t": tokens}

    def readings(size: int) -> Iterator[tuple[tuple[str, int], ...]]:
        for reading in _READINGS:
            known = math.prod(sizes.get(symbol, 1) for symbol in reading)
            if (size % known == 0) if "k" in reading else size == known:
                yield tuple((symbol, sizes.get(symbol, size // known)) for symbol in reading)

    for axes in itertools.product(*(list(readings(size)) for size in lead)):
        symbols = [symbol for axis in axes for symbol, _ in axis]
        if symbols.count("b") == 1 and symbols.count("t") == 1:
            yield axes
