"""Find the module of each parameter that a training step moves, to give each row of a batch its own values.

    linear layer      y = W a + b              each row has a low-rank adapter and an added vector
    norm              y = w∘x̂ + b              x̂ the normalized input; each row has separate w and b
    table             y = E[token] (·scale)    each row has changed entries: token and position embeddings
    head              z = h Wᵀ + b             as a linear layer, or as a table if it is tied to the embedding

Each module is tried on a few tokens first. A parameter that is used in another way cannot be
patched row by row, and is an error.
"""

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from trackstar.errors import ModelError
from trackstar.model.language_model import LanguageModel
from trackstar.tail_patch.step import TrainingStep

_PROBE = (2, 3)  # examples and tokens


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LinearLayer:
    """A linear layer of the backbone.

    Attributes:
        path: The module's path in the backbone.
        module: The module.
        weight: The name of its weight if that moves, else None.
        bias: The name of its bias if that moves, else None.
        transposed: Whether the weight is stored as [inputs, outputs] (GPT-2's Conv1D).
    """

    path: str
    module: nn.Module
    weight: str | None
    bias: str | None
    transposed: bool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NormLayer:
    """A norm of the backbone.

    Attributes:
        path: The module's path in the backbone.
        module: The module.
        weight: The name of its weight if that moves, else None.
        bias: The name of its bias if that moves, else None.
        middle_axes: Number of axes of its input between the batch's, the first, and the normalized
            one, the last.
    """

    path: str
    module: nn.Module
    weight: str | None
    bias: str | None
    middle_axes: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EmbeddingTable:
    """An embedding table: of tokens, or in the backbone of positions.

    Attributes:
        module: The module.
        weight: The name of its weight.
        scale: Factor on its entries (Gemma).
        padding_id: The entry that is never trained, or None.
    """

    module: nn.Embedding
    weight: str
    scale: float
    padding_id: int | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layout:
    """The module of each parameter that a training step moves.

    Attributes:
        linears: Linear layers of the backbone.
        norms: Norms of the backbone.
        positions: Tables in the backbone.
        tokens: The token embedding if it moves, else None.
        head_weight: The name of the head's weight if that moves, else None; the token embedding's
            if they are tied.
        head_bias: The name of the head's bias if that moves, else None.
        parameters: All of these by name.
    """

    linears: tuple[LinearLayer, ...]
    norms: tuple[NormLayer, ...]
    positions: tuple[EmbeddingTable, ...]
    tokens: EmbeddingTable | None
    head_weight: str | None
    head_bias: str | None
    parameters: dict[str, nn.Parameter]

    @property
    def numbers_per_token(self) -> int:
        """Numbers in the factors of an example's gradient, per token."""
        factors = sum(sum(layer.module.get_parameter("weight").shape) for layer in self.linears if layer.weight)
        return factors + (sum(self.parameters[self.head_weight].shape) if self.head_weight else 0)


@torch.no_grad()
def find_layout(model: LanguageModel, step: TrainingStep) -> Layout:
    """Find the modules of the step's parameters.

    Raises:
        ModelError: A parameter is used in a way that cannot be patched row by row; the message names it.
    """
    names = {id(parameter): name for name, parameter in model.module.named_parameters()}
    parameters = {names[id(p)]: p for group in step.optimizer.param_groups for p in group["params"]}
    moved = {id(parameter): name for name, parameter in parameters.items()}
    calls = _input_shapes(model)
    modules: list[LinearLayer | NormLayer | EmbeddingTable] = []
    for path, module, local_names in _moving_modules(model, moved):
        modules.append(_describe(path, module, local_names, calls.get(path, [])))
    tokens = _token_table(model, moved)
    layout = Layout(
        linears=tuple(module for module in modules if isinstance(module, LinearLayer)),
        norms=tuple(module for module in modules if isinstance(module, NormLayer)),
        positions=tuple(module for module in modules if isinstance(module, EmbeddingTable)),
        tokens=tokens,
        head_weight=moved.get(id(model.head.weight)),
        head_bias=moved.get(id(model.head.bias)),
        parameters=parameters,
    )
    _check_complete(layout)
    return layout


def _moving_modules(model: LanguageModel, moved: dict[int, str]) -> Iterator[tuple[str, nn.Module, dict[str, str]]]:
    """Modules of the backbone with moving parameters, and these parameters' local names to full names."""
    embedding = model.module.get_input_embeddings()
    for path, module in model.module.base_model.named_modules():
        local_names = {key: moved[id(p)] for key, p in module.named_parameters(recurse=False) if id(p) in moved}
        if local_names and module is not embedding:
            yield path, module, local_names


def _input_shapes(model: LanguageModel) -> dict[str, list[tuple[int, ...]]]:
    """Shape of the first input of each call, for each of the backbone's modules, with a batch of `_PROBE`."""
    shapes: dict[str, list[tuple[int, ...]]] = {}
    handles = []
    for path, module in model.module.base_model.named_modules():

        def record(_module: nn.Module, arguments: tuple[object, ...], path: str = path) -> None:
            first = arguments[0] if arguments else None
            shapes.setdefault(path, []).append(tuple(first.shape) if isinstance(first, Tensor) else ())

        handles.append(module.register_forward_pre_hook(record))
    try:
        token_ids = torch.arange(_PROBE[0] * _PROBE[1], device=model.device).view(_PROBE) % model.head.weight.shape[0]
        with contextlib.suppress(Exception):  # the error has its line in `_check_runs_from_embeddings`
            model.states_from_embeddings(model.embeddings(token_ids))
    finally:
        for handle in handles:
            handle.remove()
    _check_runs_from_embeddings(model, token_ids)
    return shapes


def _check_runs_from_embeddings(model: LanguageModel, token_ids: Tensor) -> None:
    """Raise unless the head's input is the last hidden state of the backbone run from token embeddings."""
    try:
        found = model.states_from_embeddings(model.embeddings(token_ids)) if model.from_base else None
    except Exception:  # of a family whose layers read the tokens, too
        found = None
    if found is None or not torch.allclose(found, model.hidden_states(token_ids), rtol=1e-3, atol=1e-4, equal_nan=True):
        raise ModelError(
            f"{model.source}: {model.architecture} does not compute the head's input from token embeddings alone; the "
            'fast tail-patch needs that, use the exact path, `path="exact"`'
        )


def _describe(
    path: str, module: nn.Module, local_names: dict[str, str], calls: list[tuple[int, ...]]
) -> LinearLayer | NormLayer | EmbeddingTable:
    name = next(iter(local_names.values()))
    if len(calls) != 1:
        raise _unsupported(name, f"its module is called {len(calls)} times in a forward pass, expected once")
    shape = calls[0]
    weight, bias = local_names.get("weight"), local_names.get("bias")
    if isinstance(module, (nn.Linear, Conv1D)):
        if shape[:-1] != _PROBE:
            raise _unsupported(name, f"its module reads a tensor of shape {shape}, expected [batch, tokens, inputs]")
        return LinearLayer(path=path, module=module, weight=weight, bias=bias, transposed=isinstance(module, Conv1D))
    if isinstance(module, nn.Embedding):
        if len(shape) != 2 or shape[1] != _PROBE[1]:
            raise _unsupported(name, f"its table is read at a tensor of shape {shape}, expected [batch, tokens]")
        return _table(module, local_names["weight"])
    if len(shape) < 3 or shape[0] != _PROBE[0] or any(p.ndim != 1 for p in module.parameters()):
        raise _unsupported(name, f"{type(module).__name__} is neither a linear layer, an embedding nor a norm")
    norm = NormLayer(path=path, module=module, weight=weight, bias=bias, middle_axes=len(shape) - 2)
    _try_norm(norm, name, shape)
    return norm


def _token_table(model: LanguageModel, moved: dict[int, str]) -> EmbeddingTable | None:
    module = model.module.get_input_embeddings()
    weight = module.get_parameter("weight")
    if id(weight) not in moved:
        return None
    if not isinstance(module, nn.Embedding):
        raise _unsupported(
            moved[id(weight)], f"the token embedding is {type(module).__name__}, expected an embedding table"
        )
    return _table(module, moved[id(weight)])


def _table(module: nn.Embedding, name: str) -> EmbeddingTable:
    if module.max_norm is not None or module.scale_grad_by_freq:
        raise _unsupported(name, "its table renormalizes entries or scales gradients by frequency")
    factor = getattr(module, "embed_scale", 1.0)
    # In the weight's precision, as the module multiplies.
    scale = float(torch.as_tensor(factor).to(module.weight.dtype))
    ids = torch.arange(min(3, module.num_embeddings), device=module.weight.device)[None]
    if not torch.allclose(module(ids), module.weight[ids] * scale):
        raise _unsupported(name, f"{type(module).__name__} does more than look entries up and scale them")
    return EmbeddingTable(module=module, weight=name, scale=scale, padding_id=module.padding_idx)


def norm_output(norm: NormLayer, inputs: Tensor, vectors: dict[str, Tensor]) -> Tensor:
    """Output of a torch norm with separate weights and biases for each row.

    Args:
        norm: The norm; see `is_standard`.
        inputs: Its inputs, batch axis first.
        vectors: `weight` and `bias` with a batch axis, shaped to broadcast; the module's own are
            used if absent.
    """
    module = norm.module
    if isinstance(module, nn.LayerNorm):
        normalized = nn.functional.layer_norm(inputs, module.normalized_shape, None, None, module.eps)
    else:
        assert isinstance(module, nn.RMSNorm)
        normalized = nn.functional.rms_norm(inputs, module.normalized_shape, None, module.eps)
    weights: dict[str, Tensor] = {**dict(module.named_parameters()), **vectors}
    if "weight" in weights:
        normalized = normalized * weights["weight"]
    return normalized + weights["bias"] if "bias" in weights else normalized


def is_standard(module: nn.Module) -> bool:
    """Whether it is a torch norm, whose code supports only one weight for the whole batch."""
    return isinstance(module, (nn.LayerNorm, nn.RMSNorm))


def by_row(norm: NormLayer, vectors: Tensor) -> Tensor:
    """[batch, width] with the norm's middle axes inserted, so that each row broadcasts over its input."""
    return vectors.view(len(vectors), *[1] * norm.middle_axes, vectors.shape[-1])


def _try_norm(norm: NormLayer, name: str, shape: tuple[int, ...]) -> None:
    """Raise if two rows with separate vectors differ from what each gives alone."""
    parameters = dict(norm.module.named_parameters())
    if set(parameters) - {"weight", "bias"}:
        raise _unsupported(name, f"{type(norm.module).__name__} has parameters other than a weight and a bias")
    first = next(iter(parameters.values()))
    width = len(first)
    inputs = torch.linspace(-1, 2, _PROBE[0] * 5 * width, device=first.device, dtype=first.dtype)
    inputs = inputs.sin().view(_PROBE[0], *[1] * (norm.middle_axes - 1), 5, width)
    changed = {key: torch.stack([p, 1.25 * p + 0.125]) for key, p in parameters.items()}
    rows = {key: by_row(norm, value) for key, value in changed.items()}
    try:
        together = norm_output(norm, inputs, rows) if is_standard(norm.module) else _swapped(norm, inputs, rows)
        alone = [_swapped(norm, inputs[r : r + 1], {k: v[r] for k, v in changed.items()}) for r in range(_PROBE[0])]
        agrees = torch.allclose(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    except (RuntimeError, TypeError, ValueError):
        agrees = False
    if not agrees or shape[-1] != width:
        raise _unsupported(name, f"{type(norm.module).__name__} is no norm whose rows can have separate weights")


def _swapped(norm: NormLayer, inputs: Tensor, vectors: dict[str, Tensor]) -> Tensor:
    return functional_call(norm.module, vectors, (inputs,))


def _check_complete(layout: Layout) -> None:
    """Raise unless each parameter has one module; a head tied to the token embedding counts once."""
    names = [name for layer in (*layout.linears, *layout.norms) for name in (layer.weight, layer.bias) if name]
    names += [table.weight for table in layout.positions]
    names += [name for name in (layout.head_weight, layout.head_bias) if name]
    if layout.tokens is not None and layout.tokens.weight != layout.head_weight:
        names.append(layout.tokens.weight)
    for name in layout.parameters:
        if names.count(name) != 1:
            raise _unsupported(name, f"it is used by {names.count(name)} modules of the model, expected one")


def _unsupported(name: str, reason: str) -> ModelError:
    return ModelError(f'{name}: {reason}; the fast tail-patch cannot move it, use the exact path, `path="exact"`')
