"""Run the backbone with separate parameters for each row of a batch, for gradients and for patches.

Vectors of norms, [batch, width], replace the modules' parameters. A norm of torch is computed here;
other norms, which multiply the normalized input by their weight, get a weight that broadcasts. The
caller's hooks handle linear layers and position embeddings.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from trackstar.model.language_model import LanguageModel
from trackstar.tail_patch.layout import EmbeddingTable, Layout, LinearLayer, NormLayer, by_row, is_standard, norm_output

OnLinear = Callable[[LinearLayer, Tensor, Tensor], None]
"""Called with a linear layer, its inputs and its outputs; may change the outputs in place."""
OnTable = Callable[[EmbeddingTable, Tensor, Tensor], Tensor]
"""Called with a table, the ids that were looked up and their embeddings; returns their replacement."""
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
    """Yield the function from token embeddings [batch, tokens, width] to hidden states of the same shape.

    Args:
        model: The model.
        layout: The modules of its parameters.
        vectors: Weights and biases of norms by name, one row per row of the batch; other norms use
            the modules'.
        on_linear: Receives the inputs and outputs of linear layers, and may change the outputs in place.
        on_table: Replaces the embeddings from the backbone's tables.
    """
    swapped: dict[str, Tensor] = {}
    hooks: list[tuple[nn.Module, Callable[..., Tensor | None]]] = []
    hooks += [(layer.module, _linear_hook(layer, on_linear)) for layer in layout.linears]
    hooks += [(table.module, _table_hook(table, on_table)) for table in layout.positions]
    for norm in layout.norms:
        rows = _rows(norm, vectors)
        if is_standard(norm.module):
            hooks.append((norm.module, _norm_hook(norm, rows)))
        else:
            swapped.update({f"{norm.path}.{key}": value for key, value in rows.items()})
    backbone = model.module.base_model

    def run(embeddings: Tensor) -> Tensor:
        arguments = {"inputs_embeds": embeddings, "use_cache": False}
        return functional_call(backbone, swapped, (), arguments).last_hidden_state.to(model.device)

    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        yield run
    finally:
        for handle in handles:
            handle.remove()


def _rows(norm: NormLayer, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The norm's `weight` and `bias` for which there are separate rows, shaped to broadcast."""
    names = {"weight": norm.weight, "bias": norm.bias}
    return {key: by_row(norm, vectors[name]) for key, name in names.items() if name is not None and name in vectors}


def _linear_hook(layer: LinearLayer, on_linear: OnLinear) -> Callable[..., None]:
    def hook(_module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        on_linear(layer, arguments[0].to(output.device), output)  # Accelerate moves it behind this hook

    return hook


def _table_hook(table: EmbeddingTable, on_table: OnTable) -> Callable[..., Tensor]:
    def hook(_module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        return on_table(table, arguments[0].to(output.device), output)

    return hook


def _norm_hook(norm: NormLayer, rows: dict[str, Tensor]) -> Callable[..., Tensor]:
    def hook(_module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        return norm_output(norm, arguments[0].to(output.device), rows)

    return hook
