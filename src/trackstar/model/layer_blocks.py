"""Layer blocks: the weight matrices in the gradient, pooled over consecutive layers (paper, §4 and A.1.2).

Attention and MLP matrices are found by their module paths, with the same patterns for every family. The
token embedding and the head are left out. A model with any other weight matrix is refused unless the
caller passes patterns.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from trackstar.errors import OptionError, UnsupportedModelError, check_at_least
from trackstar.model.user_patterns import first_groups

Kind = Literal["attention", "mlp"]
NamedBlock = tuple[str, Kind, tuple[int, int], Sequence[str]]
"""A block's name, its kind, its first and last layer, and its matrices' names."""

# model.layers.3.self_attn.q_proj, gpt_neox.layers.3.attention.dense, transformer.h.3.attn.c_attn ...
ATTENTION_PATTERN = r".*\.(?:layers|h)\.(\d+)\.(?:self_attn|attn|attention|self_attention)\..+"
MLP_PATTERN = r".*\.(?:layers|h)\.(\d+)\.(?:mlp|feed_forward|fc1|fc2)(?:\..+)?"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WeightMatrix:
    """One weight matrix of a layer block; it maps `columns` inputs to `rows` outputs.

    Attributes:
        name: Path of its module in the model, such as `model.layers.0.self_attn.q_proj`.
        layer: Number of its layer.
        kind: Whether it belongs to the layer's attention or MLP.
        block: Index of its layer block.
        rows: Number of outputs.
        columns: Number of inputs.
        transposed: Whether the module stores it as [columns, rows] (GPT-2's Conv1D).
    """

    name: str
    layer: int
    kind: Kind
    block: int
    rows: int
    columns: int
    transposed: bool

    @property
    def parameter(self) -> str:
        """Name of its parameter in the model's state."""
        return f"{self.name}.weight"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LayerBlock:
    """Matrices of one kind in consecutive layers, projected and summed into one side×side block of φ.

    Attributes:
        name: Its kind with its first and last layer, such as `attention.0-3`.
        kind: Attention or MLP.
        first_layer: Number of its first layer.
        last_layer: Number of its last layer.
        matrices: Its matrices.
    """

    name: str
    kind: Kind
    first_layer: int
    last_layer: int
    matrices: tuple[WeightMatrix, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """Share of a model's parameters in its layer blocks.

    Attributes:
        matrices: Number of matrices in the blocks.
        parameters: Number of weights in these matrices.
        total_parameters: Number of weights in the model; tied weights count once.
        left_out: Names of the other parameters with two or more dimensions.
    """

    matrices: int
    parameters: int
    total_parameters: int
    left_out: tuple[str, ...]

    def __str__(self) -> str:
        share = self.parameters / self.total_parameters
        left_out = ", ".join(self.left_out) or "none"
        return (
            f"{self.matrices} attention and MLP matrices, {self.parameters:,} of {self.total_parameters:,} "
            f"parameters ({share:.1%}); matrices left out: {left_out}"
        )


def find_layer_blocks(
    module: nn.Module,
    *,
    blocks_per_kind: int = 8,
    attention_pattern: str | None = None,
    mlp_pattern: str | None = None,
) -> tuple[LayerBlock, ...]:
    """Name a causal language model's layer blocks, attention's first.

    Args:
        module: The model.
        blocks_per_kind: Number of blocks for attention, and for MLPs (8 in the paper); a model with
            fewer layers has one block per layer.
        attention_pattern: Regular expression that fully matches the module paths of attention
            matrices and whose first group is the layer's number; None is `ATTENTION_PATTERN`.
        mlp_pattern: The same for MLP matrices; None is `MLP_PATTERN`.

    Raises:
        UnsupportedModelError: A pattern matches no matrix, or, with the default patterns, some weight
            matrix is neither matched nor an embedding or head.
        OptionError: The number of blocks is below 1, a pattern is no regular expression with a group
            for the layer's number, or both match the same matrix.
    """
    check_at_least("layer_blocks", blocks_per_kind)
    linears = _linear_modules(module)
    patterns: dict[Kind, str | None] = {"attention": attention_pattern, "mlp": mlp_pattern}
    # Layer number of each matrix, by kind.
    matched: dict[Kind, dict[str, int]] = {kind: _matched(patterns[kind], kind, list(linears)) for kind in patterns}
    for kind, layers in matched.items():
        if not layers:
            raise UnsupportedModelError(
                f"{type(module).__name__}: found no {kind} matrix among its linear layers ({_listing(list(linears))}); "
                f"name them with `{kind}_pattern`, a regular expression whose first group is the layer's number"
            )
    both = matched["attention"].keys() & matched["mlp"].keys()
    if both:
        raise OptionError(
            f"{sorted(both)[0]}: matched by both `attention_pattern` and `mlp_pattern`; expected one; narrow either"
        )
    if attention_pattern is None and mlp_pattern is None:
        _check_all_matched(module, [*matched["attention"], *matched["mlp"]])
    blocks: list[LayerBlock] = []
    for kind, layers in matched.items():
        blocks += _pooled(kind, layers, linears, blocks_per_kind, first_block=len(blocks))
    return tuple(blocks)


def named_layer_blocks(module: nn.Module, blocks: Sequence[NamedBlock]) -> tuple[LayerBlock, ...]:
    """Layer blocks with given names and matrices, such as those of an index.

    `WeightMatrix.layer` is then the first layer of the block, since `NamedBlock` holds no more.

    Raises:
        UnsupportedModelError: The model has no linear layer with one of the matrices' names.
    """
    linears = _linear_modules(module)
    result = []
    for number, (name, kind, (first, last), names) in enumerate(blocks):
        missing = [matrix for matrix in names if matrix not in linears]
        if missing:
            raise UnsupportedModelError(
                f"{type(module).__name__}: has no linear layer {missing[0]}; expected the model that was indexed"
            )
        matrices = tuple(_matrix(matrix, first, kind, number, linears[matrix]) for matrix in names)
        result.append(LayerBlock(name=name, kind=kind, first_layer=first, last_layer=last, matrices=matrices))
    return tuple(result)


def coverage(module: nn.Module, blocks: tuple[LayerBlock, ...]) -> Coverage:
    """Share of the model's parameters in the blocks."""
    covered = {matrix.parameter for block in blocks for matrix in block.matrices}
    parameters = dict(module.named_parameters())
    return Coverage(
        matrices=len(covered),
        parameters=sum(parameters[name].numel() for name in covered),
        total_parameters=sum(parameter.numel() for parameter in parameters.values()),
        left_out=tuple(n for n, p in parameters.items() if p.ndim >= 2 and n not in covered),
    )


def _linear_modules(module: nn.Module) -> dict[str, nn.Module]:
    return {name: child for name, child in module.named_modules() if isinstance(child, (nn.Linear, Conv1D))}


def _matched(given: str | None, kind: Kind, names: Sequence[str]) -> dict[str, int]:
    """Layer number of each matrix that the pattern matches; None is the kind's default pattern."""
    if given is None:
        default = re.compile(ATTENTION_PATTERN if kind == "attention" else MLP_PATTERN)
        groups = {name: match[1] for name in names if (match := default.fullmatch(name)) is not None}
    else:
        groups = first_groups(given, names, f"{kind}_pattern")
    layers: dict[str, int] = {}
    for name, group in groups.items():
        if not (group or "").isdecimal():
            raise OptionError(
                f"`{kind}_pattern`: expected a first group that captures the layer's number, found {group!r} in {name}"
            )
        layers[name] = int(group or "")
    return layers


def _check_all_matched(module: nn.Module, matched: list[str]) -> None:
    """Raise if a weight matrix is neither matched nor an embedding or head."""
    parameters = {f"{name}.weight" for name in matched}
    head = getattr(module, "get_output_embeddings", lambda: None)()
    embeddings = {id(child.weight) for child in module.modules() if isinstance(child, nn.Embedding)}
    if head is not None:
        embeddings.add(id(head.weight))
    missed = [
        name
        for name, parameter in module.named_parameters()
        if parameter.ndim >= 2 and name not in parameters and id(parameter) not in embeddings
    ]
    if missed:
        raise UnsupportedModelError(
            f"{type(module).__name__}: {len(missed)} weight matrices match no known pattern of attention or MLP "
            f"matrices ({_listing(missed)}); name the matrices to use with `attention_pattern` and `mlp_pattern`; "
            "this leaves out the others"
        )


def _listing(names: list[str], most: int = 8) -> str:
    """The distinct names with `*` for layer numbers, at most `most` of them."""
    distinct = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))
    shown = ", ".join(distinct[:most]) or "none"
    return shown if len(distinct) <= most else f"{shown} and {len(distinct) - most} more"


def _pooled(
    kind: Kind,
    layer_of: dict[str, int],
    linears: dict[str, nn.Module],
    blocks_per_kind: int,
    *,
    first_block: int,
) -> list[LayerBlock]:
    """Blocks of one kind: the layers split into runs whose lengths differ by at most one."""
    layers = sorted(set(layer_of.values()))
    count = min(blocks_per_kind, len(layers))
    bounds = [round(i * len(layers) / count) for i in range(count + 1)]
    blocks = []
    for number in range(count):
        run = layers[bounds[number] : bounds[number + 1]]
        matrices = tuple(
            _matrix(name, layer, kind, first_block + number, linears[name])
            for name, layer in layer_of.items()
            if layer in run
        )
        blocks.append(
            LayerBlock(
                name=f"{kind}.{run[0]}-{run[-1]}",
                kind=kind,
                first_layer=run[0],
                last_layer=run[-1],
                matrices=matrices,
            )
        )
    return blocks


def _matrix(name: str, layer: int, kind: Kind, block: int, module: nn.Module) -> WeightMatrix:
    weight = module.get_parameter("weight")
    transposed = isinstance(module, Conv1D)
    rows, columns = reversed(weight.shape) if transposed else weight.shape
    return WeightMatrix(
        name=name, layer=layer, kind=kind, block=block, rows=rows, columns=columns, transposed=transposed
    )
