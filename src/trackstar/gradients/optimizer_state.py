"""Convert optimizer state to V: second moments of Adam and both Adafactors, from a file or live.

Files are this project's `optimizer.safetensors` (tensors named STATE/PARAMETER) and torch state
dicts, which name parameters by number and are loaded with `weights_only`, so that no code in them
can run. Nothing is guessed: an order of the parameters is accepted only if every tensor has its
parameter's shape.

    Adam, AdamW (torch)     v̂ = exp_avg_sq / (1 - β₂^step)          Kingma and Ba (2015), Algorithm 1
    Adafactor (both)        V = r cᵀ / mean(r)                       Shazeer and Stern (2018), Algorithm 4

A parameter that its module stores as [inputs, outputs] is transposed: V = r cᵀ/mean(r)
becomes Vᵀ = c rᵀ/mean(r).
"""

from pathlib import Path

import torch
from torch import Tensor

from trackstar.choices import SecondMomentKind
from trackstar.corpus.local_files import check_no_special_inside, check_not_special
from trackstar.errors import SecondMomentError
from trackstar.gradients.optimizer_files import (
    ESTIMATE_ADVICE,
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

MERGED_ADVICE = (
    "; the state of an adapter's training is of the adapter's matrices: pass `parameters=\"adapter\"` for their "
    'gradients, or `second_moment="estimate"`'
)
STATE_FILES = ("optimizer.safetensors", "optimizer.pt")
_TORCH_SUFFIXES = (".pt", ".pth", ".bin")

# State of factored optimizers: the mean square of each row of a matrix, and of each column.
_FACTORED = {
    "Adafactor (transformers)": ("exp_avg_sq_row", "exp_avg_sq_col"),
    "Adafactor (torch)": ("row_var", "col_var"),
}
_ADAM = ("max_exp_avg_sq", "exp_avg_sq")  # if the first exists, Adam divides by it (AMSGrad)


def find_optimizer_state(folder: Path) -> Path | None:
    """File of optimizer state in a model folder: `optimizer.safetensors`, else `optimizer.pt`, else None."""
    return next((folder / name for name in STATE_FILES if (folder / name).is_file()), None)


def second_moment_from_state(
    path: str | Path,
    model: LanguageModel,
    *,
    kind: SecondMomentKind = "factored",
    floor: float = DEFAULT_FLOOR,
) -> SecondMoment:
    """V of every covered matrix, from a file of optimizer state.

    Args:
        path: `optimizer.safetensors`, a torch state dict (`.pt`, `.pth`, `.bin`), or a folder that holds one.
        model: The model that was trained; state of another model is an error.
        kind: `factored` is the row and column means, `elementwise` every entry. Adafactor has no
            entries: its rows and columns are then multiplied out, and `source` says so.
        floor: See `DEFAULT_FLOOR`.

    Returns:
        V as the optimizer estimates E[G²], in squared units of its gradients. It does not include
        the optimizer's safeguard against division by zero (ε); `floor` takes its place.

    Raises:
        SecondMomentError: The file cannot be read, lacks the second moment of a matrix, belongs to
            another model, does not identify its parameters, or has values that no mean of squares
            can have.
    """
    path = Path(path)
    check_not_special(path, SecondMomentError)
    if path.is_dir():
        check_no_special_inside(path, SecondMomentError)
        file = find_optimizer_state(path)
        if file is None:
            raise SecondMomentError(f"{path}: holds neither {' nor '.join(STATE_FILES)}; {ESTIMATE_ADVICE}")
        path = file
    if not path.is_file():
        raise SecondMomentError(f"{path}: no such file; expected an optimizer's state, or {ESTIMATE_ADVICE}")
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
    kind: SecondMomentKind = "factored",
    floor: float = DEFAULT_FLOOR,
) -> SecondMoment:
    """V of every covered matrix, from a live optimizer of the parameters that `model.module` holds.

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
        merged = model.parameters == "merged"
        raise SecondMomentError(
            f"{source}: keeps no state of the {'merged ' if merged else ''}model's parameters; expected an optimizer "
            f"of this model object that has made a step{MERGED_ADVICE if merged else ''}"
        )
    return _second_moment(OptimizerState(source=source, of=state, beta2=beta2), model, kind=kind, floor=floor)


# ---- From state to V -----------------------------------------------------------------------------


def _second_moment(
    state: OptimizerState, model: LanguageModel, *, kind: SecondMomentKind, floor: float
) -> SecondMoment:
    moments: dict[str, Moment] = {}
    optimizers: dict[str, int] = {}
    multiplied_out = False
    for matrix in model.matrices:
        of_matrix = state.of.get(matrix.parameter)
        if of_matrix is None:
            raise SecondMomentError(
                f"{state.source}: holds no state of {matrix.parameter}; expected that of every attention and MLP "
                f"matrix; {ESTIMATE_ADVICE}"
            )
        optimizer, moment = _moment(matrix, of_matrix, state)
        optimizers[optimizer] = max(optimizers.get(optimizer, 0), _step(of_matrix))
        if kind == "factored" and isinstance(moment, ElementwiseMoment):
            moment = moment.factored()
        elif kind == "elementwise" and isinstance(moment, FactoredMoment):
            moment = ElementwiseMoment(entries=moment.values())
            multiplied_out = True
        moments[matrix.name] = moment
    origin = ", ".join(f"{name} at step {step}" if step else name for name, step in optimizers.items())
    source = f"{state.source} ({origin}{', its rows and columns multiplied out' if multiplied_out else ''})"
    return checked_second_moment(SecondMoment(kind=kind, moments=moments, source=source, floor=floor), model.matrices)


def _moment(matrix: WeightMatrix, of_matrix: ParameterState, state: OptimizerState) -> tuple[str, Moment]:
    """The optimizer's name, and V of one matrix as [rows = outputs, columns = inputs], a copy in float32."""
    for optimizer, (row_key, column_key) in _FACTORED.items():
        if row_key in of_matrix and column_key in of_matrix:
            return optimizer, _from_factors(matrix, of_matrix[row_key], of_matrix[column_key])
    key = next((key for key in _ADAM if key in of_matrix), None)
    if key is None:
        raise SecondMomentError(
            f"{state.source}: keeps {listed(of_matrix)} of {matrix.parameter}; expected the "
            f"second moment of Adam, AdamW or Adafactor (exp_avg_sq, exp_avg_sq_row, row_var); {ESTIMATE_ADVICE}"
        )
    step, beta2 = _step(of_matrix), state.beta2.get(matrix.parameter)
    if step < 1 or beta2 is None or not 0 <= beta2 < 1:
        raise SecondMomentError(
            f"{state.source}: {matrix.parameter} has step {step} and beta2 {beta2}; expected a step of 1 or more and "
            "a beta2 from 0 to below 1, for the bias correction of Adam's second moment"
        )
    entries = of_matrix[key].float() / (1 - beta2**step)
    return "Adam", ElementwiseMoment(entries=matrix.of_parameter(entries).contiguous())


def _from_factors(matrix: WeightMatrix, row: Tensor, column: Tensor) -> FactoredMoment:
    """V = row columnᵀ / mean(row) as stored, transposed if the module stores [inputs, outputs]."""
    if matrix.expert is not None:  # both Adafactors factor the slices of a 3-D parameter one by one
        row, column = row[matrix.expert], column[matrix.expert]
    row, column = row.float().flatten().clone(), column.float().flatten().clone()
    if not matrix.transposed:
        return FactoredMoment(row=row, column=column)
    # Vᵀ = column rowᵀ/mean(row) = column (row·mean(column)/mean(row))ᵀ/mean(column). Up to
    # rounding, the means agree.
    ratio = column.mean() / row.mean()
    return FactoredMoment(row=column, column=row * ratio)


def _step(state: ParameterState) -> int:
    """Number of steps made on a parameter; 0 if the state has no valid number."""
    try:
        return min(int(state.get("step", 0)), 2**53)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return 0
