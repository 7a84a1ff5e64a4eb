"""Which weight matrices enter the gradient, and how consecutive layers are pooled into blocks (paper, §4 and A.1.2).

Attention and MLP matrices are found by their module paths, the same way in every family; the token embedding and
a head are left out. A model in which any other matrix would be missed is refused unless patterns name what to take.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from trackstar.errors import OptionError, UnsupportedModelError

Kind = Literal["attention", "mlp"]
# A block's name, kind, first and last layer, and its matrices' names.
NamedBlock = tuple[str, Kind, tuple[int, int], Sequence[str]]

# model.layers.3.self_attn.q_proj, gpt_neox.layers.3.attention.dense, transformer.h.3.attn.c_attn ...
ATTENTION_PATTERN = r".*\.(?:layers|h)\.(\d+)\.(?:self_attn|attn|attention|self_attention)\..+"
MLP_PATTERN = r".*\.(?:layers|h)\.(\d+)\.(?:mlp|feed_forward|fc1|fc2)(?:\..+)?"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WeightMatrix:
    """One weight matrix whose gradient counts; it maps `columns` inputs to `rows` outputs.

    Attributes:
        name: Its module's path in the model, such as `model.layers.0.self_attn.q_proj`.
        layer: The layer's number.
        kind: Whether it belongs to the layer's attention or MLP.
        block: The index of its layer block.
        rows: Number of outputs.
        columns: Number of inputs.
        transposed: Whether the module keeps it as [columns, rows] (GPT-2's Conv1D).
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
        """The name of its parameter in the model's state."""
        return f"{self.name}.weight"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LayerBlock:
    """Consecutive layers' matrices of one kind, projected and summed into one side×side block of φ.

    Attributes:
        name: `attention.0-3`: its kind with its first and last layer.
        kind: Attention or MLP.
        first_layer: The first of its layers.
        last_layer: The last of its layers.
        matrices: The matrices pooled in it.
    """

    name: str
    kind: Kind
    first_layer: int
    last_layer: int
    matrices: tuple[WeightMatrix, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """What share of a model its layer blocks cover.

    Attributes:
        matrices: Number of matrices covered.
        parameters: Number of weights in them.
        total_parameters: Number of weights in the model, tied ones once.
        left_out: Names of the parameters not covered that have two or more dimensions.
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
        blocks_per_kind: Number of blocks for attention, and as many for the MLPs (8 in the paper); a model of fewer
            layers has a block a layer.
        attention_pattern: Regular expression that fully matches the module paths of attention matrices and whose
            first group is the layer's number; None finds them as the common families name them.
        mlp_pattern: The same for MLP matrices.

    Raises:
        UnsupportedModelError: No matrix is found for a kind, or, without patterns, some matrix would be missed.
        OptionError: A pattern is no regular expression with a group for the layer's number.
    """
    if blocks_per_kind < 1:
        raise OptionError(f"layer blocks: found {blocks_per_kind}, expected 1 or more for each of attention and MLP")
    linears = _linear_modules(module)
    patterns: dict[Kind, re.Pattern[str]] = {
        "attention": _compiled(attention_pattern, ATTENTION_PATTERN, "--attention-pattern"),
        "mlp": _compiled(mlp_pattern, MLP_PATTERN, "--mlp-pattern"),
    }
    found: dict[Kind, dict[str, int]] = {kind: _matched(patterns[kind], kind, linears) for kind in patterns}
    for kind, names in found.items():
        if not names:
            raise UnsupportedModelError(
                f"{type(module).__name__}: found no {kind} matrix among its linear layers ({_listing(list(linears))}); "
                f"name them with --{kind}-pattern, a regular expression whose first group is the layer's number"
            )
    both = found["attention"].keys() & found["mlp"].keys()
    if both:
        raise OptionError(f"{sorted(both)[0]}: matched by both the attention and the MLP pattern; expected one")
    if attention_pattern is None and mlp_pattern is None:
        _refuse_missed(module, [*found["attention"], *found["mlp"]])
    blocks: list[LayerBlock] = []
    for kind, names in found.items():
        blocks += _pooled(kind, names, linears, blocks_per_kind, first_block=len(blocks))
    return tuple(blocks)


def named_layer_blocks(module: nn.Module, blocks: Sequence[NamedBlock]) -> tuple[LayerBlock, ...]:
    """Layer blocks that were named before, such as by an index.

    A matrix's own layer is not needed any more; each gets its block's first.

    Raises:
        UnsupportedModelError: The model has no linear layer of that name.
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
    """What share of the model's parameters the blocks cover."""
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


def _compiled(given: str | None, default: str, option: str) -> re.Pattern[str]:
    try:
        pattern = re.compile(default if given is None else given)
    except re.error as error:
        raise OptionError(f"{option} {given!r}: not a regular expression ({error})") from None
    if pattern.groups < 1:
        raise OptionError(
            f"{option} {given!r}: expected a first group that captures the layer's number, such as (\\d+)"
        )
    return pattern


def _matched(pattern: re.Pattern[str], kind: Kind, linears: dict[str, nn.Module]) -> dict[str, int]:
    """Layer number of each matrix that the pattern names."""
    layers: dict[str, int] = {}
    for name in linears:
        match = pattern.fullmatch(name)
        if match is None:
            continue
        if not (match[1] or "").isdigit():
            raise OptionError(
                f"--{kind}-pattern: its first group captured {match[1]!r} of {name}, expected the layer's number"
            )
        layers[name] = int(match[1])
    return layers


def _refuse_missed(module: nn.Module, covered: list[str]) -> None:
    known = {f"{name}.weight" for name in covered}
    head = getattr(module, "get_output_embeddings", lambda: None)()
    embeddings = {id(child.weight) for child in module.modules() if isinstance(child, nn.Embedding)}
    if head is not None:
        embeddings.add(id(head.weight))
    missed = [
        name
        for name, parameter in module.named_parameters()
        if parameter.ndim >= 2 and name not in known and id(parameter) not in embeddings
    ]
    if missed:
        raise UnsupportedModelError(
            f"{type(module).__name__}: {len(missed)} weight matrices are neither attention nor MLP matrices that "
            f"trackstar knows ({_listing(missed)}); name what to take with --attention-pattern and --mlp-pattern, "
            "the rest is then left out and said so"
        )


def _listing(names: list[str], most: int = 8) -> str:
    """The distinct names with layer numbers starred, at most `most` of them."""
    distinct = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))
    shown = ", ".join(distinct[:most]) or "none"
    return shown if len(distinct) <= most else f"{shown} and {len(distinct) - most} more"


def _pooled(
    kind: Kind,
    names: dict[str, int],
    linears: dict[str, nn.Module],
    blocks_per_kind: int,
    *,
    first_block: int,
) -> list[LayerBlock]:
    """Split the layers into runs whose lengths differ by at most one."""
    layers = sorted(set(names.values()))
    count = min(blocks_per_kind, len(layers))
    bounds = [round(i * len(layers) / count) for i in range(count + 1)]
    blocks = []
    for number in range(count):
        run = layers[bounds[number] : bounds[number + 1]]
        matrices = tuple(
            _matrix(name, layer, kind, first_block + number, linears[name])
            for name, layer in names.items()
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
