"""Layer blocks: the weight matrices in the gradient, pooled over consecutive layers (paper, §4 and A.1.2).

Attention and MLP matrices are found by the words in their paths, the same for every family. Embeddings,
the head, and projections outside the layers are left out. A model with a large weight matrix of another
kind is refused unless the caller passes patterns.
"""

import dataclasses
import re
import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trackstar.errors import OptionError, UnsupportedModelError, check_at_least
from trackstar.model.adapter import Adapter
from trackstar.model.experts import ExpertStack, expert_stacks
from trackstar.model.user_patterns import first_groups

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

Kind = Literal["attention", "mlp"]
NamedBlock = tuple[str, Kind, tuple[int, int], Sequence[str]]
"""A block's name, its kind, its first and last layer, and its matrices' names."""

ATTENTION_WORDS = (
    "attn", "attention", "mixer", "mamba", "ssm", "conv", "recurrent", "temporal", "lstm", "retention", "delta",
)  # fmt: skip
"""A matrix is attention's, or of what mixes tokens in its place, if its path has one of these."""

MLP_WORDS = (
    "mlp", "ffn", "feed_forward", "feedforward", "ff", "fc", "moe", "expert", "intermediate", "output", "dense",
    "linear", "adapter", "per_layer", "altup", "laurel", "up_proj", "down_proj", "gate_proj",
)  # fmt: skip
"""A matrix is the MLP's if its path has one of these, and none of `ATTENTION_WORDS` before it."""


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
        transposed: Whether it is stored as [columns, rows] (GPT-2's Conv1D, some experts).
        expert: Number of its slice of a 3-D parameter, if it is a fused expert's; its name is then the
            parameter's with this number, such as `model.layers.0.mlp.experts.down_proj.3`.
        shared_by: Paths of further modules that compute with the same parameter.
        adapter: Name of the adapter that it is of, which its module's path ends with: that of
            `q_proj.lora_A` is then `q_proj.lora_A.ADAPTER`.
    """

    name: str
    layer: int
    kind: Kind
    block: int
    rows: int
    columns: int
    transposed: bool
    expert: int | None = None
    shared_by: tuple[str, ...] = ()
    adapter: str | None = None

    @property
    def parameter(self) -> str:
        """Name of its parameter in the model's state."""
        return f"{self._path}.weight" if self.expert is None else self.name.rpartition(".")[0]

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths of the linear layers that compute with it; none for a fused expert's."""
        return () if self.expert is not None else (self._path, *self.shared_by)

    @property
    def _path(self) -> str:
        """Path of its linear layer."""
        return self.name if self.adapter is None else f"{self.name}.{self.adapter}"

    def of_parameter(self, values: Tensor) -> Tensor:
        """The matrix's part of values of its parameter's shape, as [rows, columns]."""
        part = values if self.expert is None else values[self.expert]
        return part.mT if self.transposed else part


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
        total_parameters: Number of weights in the model, or that its adapter trains if gradients are
            the adapter's; tied weights count once.
        left_out: Names of the other parameters with two or more dimensions, or of all others that the
            adapter trains.
    """

    matrices: int
    parameters: int
    total_parameters: int
    left_out: tuple[str, ...]

    def __str__(self) -> str:
        share = self.parameters / self.total_parameters
        left_out = _listing(list(self.left_out), most=len(self.left_out))
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
    used: Collection[str] | None = None,
    adapter: Adapter | None = None,
) -> tuple[LayerBlock, ...]:
    """Name a causal language model's layer blocks, attention's first.

    Without patterns, each linear layer and each fused expert of a layer is attention's or the MLP's
    by the words in its path (`ATTENTION_WORDS`, `MLP_WORDS`).

    Args:
        module: The model.
        blocks_per_kind: Number of blocks for attention, and for MLPs (8 in the paper); a model with
            fewer layers has one block per layer.
        attention_pattern: Regular expression that fully matches the module paths of attention
            matrices and whose first group is the layer's number; None goes by words.
        mlp_pattern: The same for MLP matrices; None goes by words.
        used: Paths of the linear layers that compute with a text, such as the language model's and not
            its vision tower's; the others are left out unless a pattern names them. None is all.
        adapter: The adapter whose matrices are named in place of the model's own; None names the model's.

    Raises:
        UnsupportedModelError: A pattern matches no matrix, or, without patterns, some weight matrix of
            a layer is neither attention's nor the MLP's, or is no linear layer's.
        OptionError: The number of blocks is below 1, a pattern is no regular expression with a group
            for the layer's number, or both match the same matrix.
    """
    check_at_least("layer_blocks", blocks_per_kind)
    sources = _sources(module, adapter)
    names = [
        name
        for name, source in sources.items()
        if used is None or not source.modules or any(path in used for path in source.modules)
    ]
    # Layer number of each matrix, by kind.
    matched: dict[Kind, dict[str, int]] = {
        "attention": _matched(attention_pattern, "attention", sources, names),
        "mlp": _matched(mlp_pattern, "mlp", sources, names),
    }
    without = attention_pattern is None and mlp_pattern is None
    for kind, layers in matched.items():
        # Without patterns, a model of state spaces alone has no MLP matrices.
        if not layers and not (without and any(matched.values())):
            raise UnsupportedModelError(
                f"{type(module).__name__}: found no {kind} matrix among its linear layers ({_listing(names)}); "
                f"name them with `{kind}_pattern`, a regular expression whose first group is the layer's number"
            )
    both = matched["attention"].keys() & matched["mlp"].keys()
    if both:
        raise OptionError(
            f"{sorted(both)[0]}: matched by both `attention_pattern` and `mlp_pattern`; expected one; narrow either"
        )
    if without:
        _check_all_matched(module, names, {**matched["attention"], **matched["mlp"]}, sources, adapter)
    blocks: list[LayerBlock] = []
    for kind, layers in matched.items():
        if not layers:
            continue
        blocks += _pooled(kind, layers, sources, blocks_per_kind, first_block=len(blocks))
    return tuple(blocks)


def named_layer_blocks(
    module: nn.Module, blocks: Sequence[NamedBlock], adapter: Adapter | None = None
) -> tuple[LayerBlock, ...]:
    """Layer blocks with given names and matrices, such as those of an index.

    `WeightMatrix.layer` is then the first layer of the block, since `NamedBlock` holds no more.

    Raises:
        UnsupportedModelError: The model has no linear layer with one of the matrices' names.
    """
    sources = _sources(module, adapter)
    result = []
    for number, (name, kind, (first, last), names) in enumerate(blocks):
        missing = [matrix for matrix in names if matrix not in sources]
        if missing:
            raise UnsupportedModelError(
                f"{type(module).__name__}: has no linear layer {missing[0]}; expected the model that was indexed"
            )
        matrices = tuple(_matrix(matrix, first, kind, number, sources[matrix]) for matrix in names)
        result.append(LayerBlock(name=name, kind=kind, first_layer=first, last_layer=last, matrices=matrices))
    return tuple(result)


def coverage(module: nn.Module, blocks: tuple[LayerBlock, ...], adapter: Adapter | None = None) -> Coverage:
    """Share of the model's parameters, or of those that its adapter trains, in the blocks."""
    covered = {matrix.parameter for block in blocks for matrix in block.matrices}
    parameters = dict(module.named_parameters())
    if adapter is not None and adapter.parameters == "adapter":
        parameters = {name: parameters[name] for name in adapter.trained}
        return Coverage(
            matrices=sum(len(block.matrices) for block in blocks),
            parameters=sum(parameters[name].numel() for name in covered),
            total_parameters=sum(parameter.numel() for parameter in parameters.values()),
            left_out=tuple(name for name in parameters if name not in covered),
        )
    return Coverage(
        matrices=sum(len(block.matrices) for block in blocks),
        parameters=sum(parameters[name].numel() for name in covered),
        total_parameters=sum(parameter.numel() for parameter in parameters.values()),
        left_out=tuple(n for n, p in parameters.items() if p.ndim >= 2 and n not in covered),
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """A weight matrix before it is in a block; attributes as in `WeightMatrix`."""

    parameter: str
    modules: tuple[str, ...]
    rows: int
    columns: int
    transposed: bool
    expert: int | None
    adapter: str | None = None


def _sources(module: nn.Module, adapter: Adapter | None = None) -> dict[str, _Source]:
    """Every weight matrix of linear layers and fused experts, by name, without what is tied to embeddings.

    Those of an adapter alone if gradients are of its matrices.
    """
    if adapter is not None and adapter.parameters == "adapter":
        return _adapter_sources(module, adapter)
    excluded = {id(child.weight) for child in module.modules() if isinstance(child, nn.Embedding)}
    stacks: dict[str, list[ExpertStack]] = {}
    for stack in expert_stacks(module):
        stacks.setdefault(stack.module, []).append(stack)
    owners: dict[int, str] = {}
    sources: dict[str, _Source] = {}
    for name, child in module.named_modules():
        for stack in stacks.get(name, ()):
            for number, of_expert in enumerate(stack.names):
                sources[of_expert] = _Source(
                    parameter=stack.parameter,
                    modules=(),
                    rows=stack.rows,
                    columns=stack.columns,
                    transposed=stack.transposed,
                    expert=number,
                )
        if not isinstance(child, (nn.Linear, Conv1D)) or id(child.weight) in excluded:
            continue
        owner = owners.setdefault(id(child.weight), name)
        if owner != name:
            sources[owner] = dataclasses.replace(sources[owner], modules=(*sources[owner].modules, name))
            continue
        transposed = isinstance(child, Conv1D)
        rows, columns = reversed(child.weight.shape) if transposed else child.weight.shape
        sources[name] = _Source(
            parameter=f"{name}.weight", modules=(name,), rows=rows, columns=columns, transposed=transposed, expert=None
        )
    return sources


def _adapter_sources(module: nn.Module, adapter: Adapter) -> dict[str, _Source]:
    """The matrices that an adapter trains, by name."""
    sources: dict[str, _Source] = {}
    for path, name in adapter.matrices.items():
        rows, columns = module.get_parameter(f"{path}.weight").shape
        sources[name] = _Source(
            parameter=f"{path}.weight", modules=(path,), rows=rows, columns=columns, transposed=False, expert=None,
            adapter=adapter.name,
        )  # fmt: skip
    return sources


def _matched(given: str | None, kind: Kind, sources: Mapping[str, _Source], names: Sequence[str]) -> dict[str, int]:
    """Layer number of each matrix of the kind: by the pattern among all, or by words among `names`."""
    if given is None:
        kinds = {name: _kind(name) for name in names}
        return {name: found[1] for name, found in kinds.items() if found is not None and found[0] == kind}
    layers: dict[str, int] = {}
    for name, group in first_groups(given, list(sources), f"{kind}_pattern").items():
        if not (group or "").isdecimal():
            raise OptionError(
                f"`{kind}_pattern`: expected a first group that captures the layer's number, found {group!r} in {name}"
            )
        layers[name] = int(group or "")
    return layers


def _kind(name: str) -> tuple[Kind | None, int] | None:
    """Kind and layer number of a matrix by its path; None if it is in no layer."""
    parts = name.split(".")
    place = next((place for place, part in enumerate(parts) if part.isdecimal()), None)
    if place is None or place == len(parts) - 1:  # a list of layers of its own, not a layer's part
        return None
    for part in (*parts[place + 1 :], *parts[place - 1 : place]):  # such as cross_attn_layers.0.q_proj
        if any(word in part for word in ATTENTION_WORDS):
            return "attention", int(parts[place])
        if any(word in part for word in MLP_WORDS):
            return "mlp", int(parts[place])
    return None, int(parts[place])


def _check_all_matched(
    module: nn.Module,
    names: Sequence[str],
    matched: Mapping[str, int],
    sources: Mapping[str, _Source],
    adapter: Adapter | None,
) -> None:
    """Raise if a weight matrix of a layer is of no kind, or is no linear layer's or fused expert's.

    Convolutions, embeddings, norms and the small matrices of routers and state spaces are left out.
    """
    missed = [name for name in names if name not in matched and _kind(name) is not None]
    covered = {sources[name].parameter for name in matched}
    linear = {f"{path}.weight" for path, child in module.named_modules() if isinstance(child, (nn.Linear, Conv1D))}
    usual = statistics.median(sources[name].rows * sources[name].columns for name in matched)
    owners = dict(module.named_modules())
    of_adapter = adapter is not None and adapter.parameters == "adapter"  # which knows that it trains no others
    for name, parameter in () if of_adapter else module.named_parameters():
        owner = owners[name.rpartition(".")[0]]
        bare = name not in covered and name not in linear and not isinstance(owner, (nn.Embedding, *_CONVOLUTIONS))
        if (
            bare
            and parameter.ndim >= 2
            and _kind(name.removesuffix(".weight")) is not None
            and parameter.numel() >= usual
        ):
            missed.append(name)
    if missed:
        raise UnsupportedModelError(
            f"{type(module).__name__}: {len(missed)} weight matrices match no known pattern of attention or MLP "
            f"matrices ({_listing(missed)}); name the matrices to use with `attention_pattern` and `mlp_pattern`; "
            "this leaves out the others"
        )


def _listing(names: list[str], most: int = 8) -> str:
    """The distinct names with `*` for layer numbers, at most `most` of them."""
    distinct = list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names))
    shown = ", ".join(distinct[:most]) or "none"
    return shown if len(distinct) <= most else f"{shown} and {len(distinct) - most} more"


def _pooled(
    kind: Kind,
    layer_of: dict[str, int],
    sources: Mapping[str, _Source],
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
            _matrix(name, layer, kind, first_block + number, sources[name])
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


def _matrix(name: str, layer: int, kind: Kind, block: int, source: _Source) -> WeightMatrix:
    return WeightMatrix(
        name=name,
        layer=layer,
        kind=kind,
        block=block,
        rows=source.rows,
        columns=source.columns,
        transposed=source.transposed,
        expert=source.expert,
        shared_by=source.modules[1:],
        adapter=source.adapter,
    )
