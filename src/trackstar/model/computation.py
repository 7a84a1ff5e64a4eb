"""How a model computes with its matrices: frozen, and as the probe has found."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn

from trackstar.errors import ModelError
from trackstar.model.layer_blocks import WeightMatrix
from trackstar.model.probe import Probe


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Context in which a module is in evaluation mode, and no parameter requires gradients."""
    training = [child for child in module.modules() if child.training]
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        module.eval().requires_grad_(False)
        yield
    finally:
        for child in training:
            child.training = True
        for parameter in trainable:
            parameter.requires_grad_(True)


def module_paths(matrix: WeightMatrix) -> tuple[str, ...]:
    """Paths of the modules that compute with a matrix."""
    return matrix.modules or (matrix.parameter.rpartition(".")[0],)


def check_computed(module: nn.Module, matrix: WeightMatrix, found: Probe, source: str) -> None:
    """Raise unless a matrix takes part in the forward pass, as a product with it."""
    paths = module_paths(matrix)
    if not any(path in found.calls for path in paths):
        raise ModelError(
            f"{source}: {matrix.name} takes no part in the forward pass; exclude it with `{matrix.kind}_pattern`"
        )
    if matrix.expert is not None and found.calls[paths[0]] > 1:
        raise ModelError(
            f"{source}: the experts of {paths[0]} compute {found.calls[paths[0]]} times in a forward pass, expected "
            "once; leave them out with an `attention_pattern` and an `mlp_pattern` that do not match them"
        )
    wrong = next((path for path in paths if path in found.faults), None)
    if wrong is not None:
        raise ModelError(
            f"{source}: {wrong} ({type(module.get_submodule(wrong)).__name__}) computes something else than the "
            "product with its weight, whose gradient is not supported; leave it out with an `attention_pattern` and an "
            "`mlp_pattern` that do not match it"
        )


def input_groups(
    matrices: Sequence[WeightMatrix], groups: Mapping[str, str], repeated: frozenset[str]
) -> dict[str, str]:
    """`LanguageModel.input_groups`; a matrix of several calls, or a fused expert's, is alone."""
    leaders: dict[str, str] = {}
    result: dict[str, str] = {}
    for matrix in matrices:
        alone = matrix.name in repeated or matrix.expert is not None
        called = next(path for path in module_paths(matrix) if path in groups)
        result[matrix.name] = matrix.name if alone else leaders.setdefault(groups[called], matrix.name)
    return result
