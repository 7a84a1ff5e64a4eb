"""V from an optimizer: what Adam and the two Adafactors keep, from a file or live, as a `SecondMoment` of the matrices.

Files are this project's `optimizer.safetensors` (tensors named STATE/PARAMETER) and torch state dicts, which name
parameters by number and are loaded with `weights_only`, so that no code in them can run. Nothing is guessed: an order
of the parameters is taken only where every tensor has its parameter's shape.

    Adam, AdamW (torch)     v̂ = exp_avg_sq / (1 - β₂^step)          Kingma and Ba (2015), Algorithm 1
    Adafactor (both)        V = r cᵀ / mean(r)                       Shazeer and Stern (2018), Algorithm 4
"""

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from trackstar.errors import SecondMomentError
from trackstar.gradients.optimizer_files import (
    INSTEAD,
    OptimizerState,
    ParameterState,
    beta2_of,
    listed,
    read_named_state,
    read_numbered_state,
)
from trackstar.gradients.second_moment import (
    DEFAULT_FLOOR,
    ElementwiseMoment,
    FactoredMoment,
    Moment,
    SecondMoment,
    checked_second_moment,
)
from trackstar.model.language_model import LanguageModel
from trackstar.model.layer_blocks import WeightMatrix

STATE_FILES = ("optimizer.safetensors", "optimizer.pt")
_TORCH_SUFFIXES = (".pt", ".pth", ".bin")

# What factored optimizers keep of a matrix: means of squares over its columns, and over its rows.
_FACTORED = {
    "Adafactor (transformers)": ("exp_avg_sq_row", "exp_avg_sq_col"),
    "Adafactor (torch)": ("row_var", "col_var"),
}
_ADAM = ("max_exp_avg_sq", "exp_avg_sq")  # the first is what Adam divides by where it is there (AMSGrad)


def find_optimizer_state(folder: Path) -> Path | None:
    """The optimizer's state in a model folder: `optimizer.safetensors`, else `optimizer.pt`, else None."""
    return next((folder / name for name in STATE_FILES if (folder / name).is_file()), None)


def second_moment_from_state(
    path: str | Path,
    model: LanguageModel,
    *,
    kind: Literal["factored", "elementwise"] = "factored",
    floor: float = DEFAULT_FLOOR,
) -> SecondMoment:
    """V of every covered matrix, from a file of optimizer state.

    Args:
        path: `optimizer.safetensors`, a torch state dict (`.pt`, `.pth`, `.bin`), or a folder that holds one.
        model: Whose matrices are wanted; a file of another model's state is refused.
        kind: `factored` keeps the means over rows and columns; `elementwise` keeps every entry, which Adafactor does
            not have: its rows and columns are then multiplied out, and `source` says so.
        floor: See `DEFAULT_FLOOR`.

    Returns:
        V as the optimizer estimates E[G²], in squared units of its gradients. An optimizer's own safeguards against
        division by zero (ε) are not part of it; `floor` takes their place.

    Raises:
        SecondMomentError: The file cannot be read, holds no second moment of some matrix, is another model's, does not
            say which parameter is which, or has values that no mean of squares can have.
    """
    path = Path(path)
    if path.is_dir():
        found = find_optimizer_state(path)
        if found is None:
            raise SecondMomentError(f"{path}: holds neither {' nor '.join(STATE_FILES)}; {INSTEAD}")
        path = found
    if not path.is_file():
        raise SecondMomentError(f"{path}: no such file; expected an optimizer's state, or {INSTEAD}")
    if path.suffix == ".safetensors":
        return _second_moment(read_named_state(path, model), model, kind=kind, floor=floor)
    if path.suffix in _TORCH_SUFFIXES:
        return _second_moment(read_numbered_state(path, model), model, kind=kind, floor=floor)
    raise SecondMomentError(
        f"{path}: unknown kind of file; expected .safetensors or a torch state dict ({', '.join(_TORCH_SUFFIXES)})"
    )


def second_moment_of(
    optimizer: torch.optim.Optimizer,
    model: LanguageModel,
    *,
    kind: Literal["factored", "elementwise"] = "factored",
    floor: float = DEFAULT_FLOOR,
) -> SecondMoment:
    """V of every covered matrix, from a live optimizer of the very parameters that `model.module` holds.

    Arguments, returns and errors are those of `second_moment_from_state`.
    """
    source = f"a live {type(optimizer).__name__}"
    names = {id(parameter): name for name, parameter in model.module.named_parameters()}
    state: dict[str, ParameterState] = {}
    beta2: dict[str, float] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names.get(id(parameter))
            if name is not None and optimizer.state.get(parameter):
                state[name] = optimizer.state[parameter]
                group_beta2 = beta2_of(group)
                if group_beta2 is not None:
                    beta2[name] = group_beta2
    if not state:
        raise SecondMomentError(
            f"{source}: keeps no state of the model's parameters; expected an optimizer of this very model that has "
            "made a step"
        )
    return _second_moment(OptimizerState(source=source, of=state, beta2=beta2), model, kind=kind, floor=floor)


# ---- From state to V -----------------------------------------------------------------------------------------


def _second_moment(
    state: OptimizerState, model: LanguageModel, *, kind: Literal["factored", "elementwise"], floor: float
) -> SecondMoment:
    moments: dict[str, Moment] = {}
    optimizers: dict[str, int] = {}
    multiplied_out = False
    for matrix in model.matrices:
        kept = state.of.get(matrix.parameter)
        if kept is None:
            raise SecondMomentError(
                f"{state.source}: holds no state of {matrix.parameter}; expected that of every attention and MLP "
                f"matrix; {INSTEAD}"
            )
        optimizer, moment = _moment(matrix, kept, state)
        optimizers[optimizer] = max(optimizers.get(optimizer, 0), _step(kept))
        if kind == "factored" and isinstance(moment, ElementwiseMoment):
            moment = moment.factored()
        elif kind == "elementwise" and isinstance(moment, FactoredMoment):
            moment = ElementwiseMoment(entries=moment.values())
            multiplied_out = True
        moments[matrix.name] = moment
    origin = ", ".join(f"{name} at step {step}" if step else name for name, step in optimizers.items())
    source = f"{state.source} ({origin}{', its rows and columns multiplied out' if multiplied_out else ''})"
    return checked_second_moment(SecondMoment(kind=kind, moments=moments, source=source, floor=floor), model.matrices)


def _moment(matrix: WeightMatrix, kept: ParameterState, state: OptimizerState) -> tuple[str, Moment]:
    """The optimizer's name, and V of one matrix as [rows = outputs, columns = inputs], in float32 and in new memory."""
    for optimizer, (row_key, column_key) in _FACTORED.items():
        if row_key in kept and column_key in kept:
            return optimizer, _from_factors(matrix, kept[row_key], kept[column_key])
    key = next((key for key in _ADAM if key in kept), None)
    if key is None:
        raise SecondMomentError(
            f"{state.source}: keeps {listed(kept)} of {matrix.parameter}; expected the "
            f"second moment of Adam, AdamW or Adafactor (exp_avg_sq, exp_avg_sq_row, row_var); {INSTEAD}"
        )
    step, beta2 = _step(kept), state.beta2.get(matrix.parameter)
    if step < 1 or beta2 is None or not 0 <= beta2 < 1:
        raise SecondMomentError(
            f"{state.source}: {matrix.parameter} has step {step} and beta2 {beta2}; expected 1 or more and a number "
            "from 0 to below 1, for Adam's second moment to be corrected for its start from zero"
        )
    entries = kept[key].float() / (1 - beta2**step)
    return "Adam", ElementwiseMoment(entries=(entries.T if matrix.transposed else entries).contiguous())


def _from_factors(matrix: WeightMatrix, row: Tensor, column: Tensor) -> FactoredMoment:
    """V = row columnᵀ / mean(row) as stored, turned to [outputs, inputs] where the module keeps [inputs, outputs].

    Turned, it is column rowᵀ / mean(row): the means of both are the same but for rounding, which is made up for.
    """
    row, column = row.float().flatten().clone(), column.float().flatten().clone()
    if not matrix.transposed:
        return FactoredMoment(row=row, column=column)
    share = column.mean() / row.mean()
    return FactoredMoment(row=column, column=row * share)


def _step(kept: ParameterState) -> int:
    """How many steps the optimizer has made of a parameter; 0 where it does not say, or says nonsense."""
    try:
        return min(int(kept.get("step", 0)), 2**53)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return 0
