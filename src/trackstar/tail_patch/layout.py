"""Where in a model each parameter that a training step moves takes part, so that every row of a batch can have its own.

    linear layer      y = W a + b              rows of a batch differ by a low-rank adapter and an added vector
    norm              y = w∘x̂ + b              x̂ the normalised input; rows have their own w and b
    table             y = E[token] (·scale)    rows have their own changed entries: token and position embeddings
    head              z = h Wᵀ + b             as a linear layer, or as a table where it is tied to the embedding

Everything is tried on a few tokens first. What takes part in another way cannot be patched row by row and is refused.
"""

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
class LinearPlace:
    """A linear layer of the backbone.

    Attributes:
        path: The module's path in the backbone.
        module: The module.
        weight: The name of its weight, where that moves.
        bias: The name of its bias, where that moves.
        transposed: Whether the weight is kept as [inputs, outputs] (GPT-2's Conv1D).
    """

    path: str
    module: nn.Module
    weight: str | None
    bias: str | None
    transposed: bool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NormPlace:
    """A norm of the backbone.

    Attributes:
        path: The module's path in the backbone.
        module: The module.
        weight: The name of its weight, where that moves.
        bias: The name of its bias, where that moves.
        between: Axes of its input between the first, the batch's, and the last, which is normalised.
    """

    path: str
    module: nn.Module
    weight: str | None
    bias: str | None
    between: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TablePlace:
    """An embedding table: of tokens, or in the backbone of positions.

    Attributes:
        module: The module.
        weight: The name of its weight.
        scale: What it multiplies its entries with (Gemma).
        padding_id: The entry that is never trained, or None.
    """

    module: nn.Embedding
    weight: str
    scale: float
    padding_id: int | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layout:
    """Every place in which a training step's parameters take part.

    Attributes:
        linears: Linear layers of the backbone.
        norms: Norms of the backbone.
        positions: Tables in the backbone.
        tokens: The token embedding, where it moves.
        head_weight: The name of the head's weight, where that moves; the token embedding's where they are tied.
        head_bias: The name of the head's bias, where that moves.
        parameters: All of these by name.
    """

    linears: tuple[LinearPlace, ...]
    norms: tuple[NormPlace, ...]
    positions: tuple[TablePlace, ...]
    tokens: TablePlace | None
    head_weight: str | None
    head_bias: str | None
    parameters: dict[str, nn.Parameter]

    @property
    def numbers_per_token(self) -> int:
        """How many numbers the factors of an example's gradient have for each of its tokens."""
        factors = sum(sum(place.module.get_parameter("weight").shape) for place in self.linears if place.weight)
        return factors + (sum(self.parameters[self.head_weight].shape) if self.head_weight else 0)


@torch.no_grad()
def find_layout(model: LanguageModel, step: TrainingStep) -> Layout:
    """Where the step's parameters take part in the model.

    Raises:
        ModelError: One takes part in a way that cannot be patched row by row; the message names it.
    """
    names = {id(parameter): name for name, parameter in model.module.named_parameters()}
    parameters = {names[id(p)]: p for group in step.optimizer.param_groups for p in group["params"]}
    moved = {id(parameter): name for name, parameter in parameters.items()}
    seen = _seen_inputs(model)
    places: list[LinearPlace | NormPlace | TablePlace] = []
    for path, module, own in _owners(model, moved):
        places.append(_place(path, module, own, seen.get(path, [])))
    tokens = _token_table(model, moved)
    layout = Layout(
        linears=tuple(place for place in places if isinstance(place, LinearPlace)),
        norms=tuple(place for place in places if isinstance(place, NormPlace)),
        positions=tuple(place for place in places if isinstance(place, TablePlace)),
        tokens=tokens,
        head_weight=moved.get(id(model.head.weight)),
        head_bias=moved.get(id(model.head.bias)),
        parameters=parameters,
    )
    _refuse_missed(layout)
    return layout


def _owners(model: LanguageModel, moved: dict[int, str]) -> Iterator[tuple[str, nn.Module, dict[str, str]]]:
    """Modules of the backbone with moving parameters of their own, and those parameters' own names to full names."""
    embedding = model.module.get_input_embeddings()
    for path, module in model.module.base_model.named_modules():
        own = {key: moved[id(p)] for key, p in module.named_parameters(recurse=False) if id(p) in moved}
        if own and module is not embedding:
            yield path, module, own


def _seen_inputs(model: LanguageModel) -> dict[str, list[tuple[int, ...]]]:
    """Shapes of the first input of every call of each of the backbone's modules, for two examples of three tokens."""
    shapes: dict[str, list[tuple[int, ...]]] = {}
    handles = []
    for path, module in model.module.base_model.named_modules():

        def record(_module: nn.Module, arguments: tuple[object, ...], path: str = path) -> None:
            first = arguments[0] if arguments else None
            shapes.setdefault(path, []).append(tuple(first.shape) if isinstance(first, Tensor) else ())

        handles.append(module.register_forward_pre_hook(record))
    try:
        token_ids = torch.arange(_PROBE[0] * _PROBE[1], device=model.device).view(_PROBE) % model.head.weight.shape[0]
        model.hidden_states(model.embeddings(token_ids))
    finally:
        for handle in handles:
            handle.remove()
    return shapes


def _place(
    path: str, module: nn.Module, own: dict[str, str], calls: list[tuple[int, ...]]
) -> LinearPlace | NormPlace | TablePlace:
    name = next(iter(own.values()))
    if len(calls) != 1:
        raise _refused(name, f"its module is called {len(calls)} times in a forward pass, expected once")
    shape = calls[0]
    if isinstance(module, (nn.Linear, Conv1D)):
        if shape[:-1] != _PROBE:
            raise _refused(name, f"its module reads a tensor of shape {shape}, expected [batch, tokens, inputs]")
        weight, bias = own.get("weight"), own.get("bias")
        return LinearPlace(path=path, module=module, weight=weight, bias=bias, transposed=isinstance(module, Conv1D))
    if isinstance(module, nn.Embedding):
        if len(shape) != 2 or shape[1] != _PROBE[1]:
            raise _refused(name, f"its table is read at a tensor of shape {shape}, expected [batch, tokens]")
        return _table(module, own["weight"])
    if len(shape) < 3 or shape[0] != _PROBE[0] or any(p.ndim != 1 for p in module.parameters()):
        raise _refused(name, f"{type(module).__name__} is neither a linear layer, an embedding nor a norm")
    place = NormPlace(path=path, module=module, weight=own.get("weight"), bias=own.get("bias"), between=len(shape) - 2)
    _try_norm(place, name, shape)
    return place


def _token_table(model: LanguageModel, moved: dict[int, str]) -> TablePlace | None:
    module = model.module.get_input_embeddings()
    weight = module.get_parameter("weight")
    if id(weight) not in moved:
        return None
    if not isinstance(module, nn.Embedding):
        raise _refused(
            moved[id(weight)], f"the token embedding is {type(module).__name__}, expected an embedding table"
        )
    return _table(module, moved[id(weight)])


def _table(module: nn.Embedding, name: str) -> TablePlace:
    if module.max_norm is not None or module.scale_grad_by_freq:
        raise _refused(name, "its table renormalises entries or scales gradients by frequency")
    factor = getattr(module, "embed_scale", 1.0)
    # Multiplied in the weight's precision, as the module does.
    scale = float(torch.as_tensor(factor).to(module.weight.dtype))
    ids = torch.arange(min(3, module.num_embeddings), device=module.weight.device)[None]
    if not torch.allclose(module(ids), module.weight[ids] * scale):
        raise _refused(name, f"{type(module).__name__} does more than look entries up and scale them")
    return TablePlace(module=module, weight=name, scale=scale, padding_id=module.padding_idx)


def norm_output(place: NormPlace, inputs: Tensor, vectors: dict[str, Tensor]) -> Tensor:
    """What a norm of torch's gives with weights and biases of its rows' own.

    Args:
        place: The norm; see `is_standard`.
        inputs: What it reads, rows of the batch first.
        vectors: `weight` and `bias`, each with the batch's axis, shaped to be broadcast; the module's own otherwise.
    """
    module = place.module
    if isinstance(module, nn.LayerNorm):
        normalised = nn.functional.layer_norm(inputs, module.normalized_shape, None, None, module.eps)
    else:
        assert isinstance(module, nn.RMSNorm)
        normalised = nn.functional.rms_norm(inputs, module.normalized_shape, None, module.eps)
    own: dict[str, Tensor] = {**dict(module.named_parameters()), **vectors}
    if "weight" in own:
        normalised = normalised * own["weight"]
    return normalised + own["bias"] if "bias" in own else normalised


def is_standard(module: nn.Module) -> bool:
    """Whether it is a norm of torch's, whose own code takes one weight for the whole batch only."""
    return isinstance(module, (nn.LayerNorm, nn.RMSNorm))


def by_row(place: NormPlace, vectors: Tensor) -> Tensor:
    """[batch, width] with the axes between, so that each row of the norm's input meets its own."""
    return vectors.view(len(vectors), *[1] * place.between, vectors.shape[-1])


def _try_norm(place: NormPlace, name: str, shape: tuple[int, ...]) -> None:
    """That two rows with vectors of their own come out as each does alone."""
    own = dict(place.module.named_parameters())
    if set(own) - {"weight", "bias"}:
        raise _refused(name, f"{type(place.module).__name__} has parameters other than a weight and a bias")
    width = len(next(iter(own.values())))
    first = next(iter(own.values()))
    inputs = torch.linspace(-1, 2, _PROBE[0] * 5 * width, device=first.device, dtype=first.dtype)
    inputs = inputs.sin().view(_PROBE[0], *[1] * (place.between - 1), 5, width)
    changed = {key: torch.stack([p, 1.25 * p + 0.125]) for key, p in own.items()}
    rows = {key: by_row(place, value) for key, value in changed.items()}
    try:
        found = norm_output(place, inputs, rows) if is_standard(place.module) else _swapped(place, inputs, rows)
        alone = [_swapped(place, inputs[r : r + 1], {k: v[r] for k, v in changed.items()}) for r in range(_PROBE[0])]
        agrees = torch.allclose(found, torch.cat(alone), rtol=1e-4, atol=1e-5)
    except (RuntimeError, TypeError, ValueError):
        agrees = False
    if not agrees or shape[-1] != width:
        raise _refused(name, f"{type(place.module).__name__} is no norm whose rows can have weights of their own")


def _swapped(place: NormPlace, inputs: Tensor, vectors: dict[str, Tensor]) -> Tensor:
    return functional_call(place.module, vectors, (inputs,))


def _refuse_missed(layout: Layout) -> None:
    """That every parameter of the step has a place, and one alone but for a head tied to the token embedding."""
    found = [name for place in (*layout.linears, *layout.norms) for name in (place.weight, place.bias) if name]
    found += [place.weight for place in layout.positions]
    found += [name for name in (layout.head_weight, layout.head_bias) if name]
    if layout.tokens is not None and layout.tokens.weight != layout.head_weight:
        found.append(layout.tokens.weight)
    for name in layout.parameters:
        if found.count(name) != 1:
            raise _refused(name, f"it takes part in {found.count(name)} places of the model, expected one")


def _refused(name: str, reason: str) -> ModelError:
    return ModelError(f"{name}: {reason}; the fast tail-patch cannot move it, use the exact path")
