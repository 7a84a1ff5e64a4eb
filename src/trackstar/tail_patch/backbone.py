"""The backbone with parameters of their own for every row of a batch, shared by the gradient and the patched pass.

Norms' vectors [batch, width] take the place of the modules' own: of torch's norms by computing them here, of others
(which multiply their weight with the normalised input) by giving the module a weight that broadcasts. What else is done
to linear layers' outputs and to position embeddings, the caller does.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from trackstar.model.language_model import LanguageModel
from trackstar.tail_patch.layout import Layout, LinearPlace, NormPlace, TablePlace, by_row, is_standard, norm_output

# Given a linear layer's place, inputs and outputs, which it may change in place.
OnLinear = Callable[[LinearPlace, Tensor, Tensor], None]
# Given a table's place, the ids that were looked up and what was found; returns what takes its place.
OnTable = Callable[[TablePlace, Tensor, Tensor], Tensor]
Run = Callable[[Tensor], Tensor]


@contextmanager
def row_backbone(
    model: LanguageModel,
    layout: Layout,
    vectors: Mapping[str, Float[Tensor, "batch width"]],
    *,
    on_linear: OnLinear,
    on_table: OnTable,
) -> Iterator[Run]:
    """Yields the function from token embeddings [batch, tokens, width] to hidden states of the same shape.

    Args:
        model: The model.
        layout: Where its parameters take part.
        vectors: Weights and biases of the norms by name, a row for each of the batch; the modules' own otherwise.
        on_linear: Sees what a linear layer reads and gives, and may change the latter in place.
        on_table: Changes what a table of the backbone gives.
    """
    swapped: dict[str, Tensor] = {}
    hooks: list[tuple[nn.Module, Callable[..., Tensor | None]]] = []
    hooks += [(place.module, _linear_hook(place, on_linear)) for place in layout.linears]
    hooks += [(place.module, _table_hook(place, on_table)) for place in layout.positions]
    for norm in layout.norms:
        rows = _rows(norm, vectors)
        if is_standard(norm.module):
            hooks.append((norm.module, _norm_hook(norm, rows)))
        else:
            swapped.update({f"{norm.path}.{key}": value for key, value in rows.items()})
    backbone = model.module.base_model

    def run(embeddings: Tensor) -> Tensor:
        arguments = {"inputs_embeds": embeddings, "use_cache": False}
        return functional_call(backbone, swapped, (), arguments).last_hidden_state

    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        yield run
    finally:
        for handle in handles:
            handle.remove()


def _rows(place: NormPlace, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The norm's `weight` and `bias` where rows have their own, shaped to be broadcast."""
    names = {"weight": place.weight, "bias": place.bias}
    return {key: by_row(place, vectors[name]) for key, name in names.items() if name is not None and name in vectors}


def _linear_hook(place: LinearPlace, on_linear: OnLinear) -> Callable[..., None]:
    def hook(_module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        on_linear(place, arguments[0], output)

    return hook


def _table_hook(place: TablePlace, on_table: OnTable) -> Callable[..., Tensor]:
    def hook(_module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        return on_table(place, arguments[0], output)

    return hook


def _norm_hook(place: NormPlace, rows: dict[str, Tensor]) -> Callable[..., Tensor]:
    def hook(_module: nn.Module, arguments: tuple[Any, ...], _output: Tensor) -> Tensor:
        return norm_output(place, arguments[0], rows)

    return hook
