"""The training step that tail-patch makes on a proponent: a real optimizer with the state that training left it in.

The paper (§5.2) continues training from the final checkpoint: one step on the proponent alone, with the optimizer's
state and hyperparameters of pretraining. The step's loss is

    mean    Σ cross-entropies of the example's target tokens / their number      (as `trackstar.pretraining`)
    sum     Σ cross-entropies of the example's target tokens                     (in the units of an estimated V)

A model without optimizer state has only V, estimated as E[G²] of summed losses. Its step is Adafactor's relative step
with that V, not updated by the example: β̂₂ = 1 - step^(-∞) = 1 for every step from the second on.
"""

import dataclasses
import math
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.optim import Optimizer
from transformers.optimization import Adafactor

from trackstar.errors import ModelError, OptionError, PretrainingError, SecondMomentError
from trackstar.gradients.second_moment import FactoredMoment, SecondMoment, checked_second_moment
from trackstar.model.language_model import LanguageModel
from trackstar.model.layer_blocks import WeightMatrix
from trackstar.pretraining import OPTIMIZER_FILE, PretrainingConfig, learning_rate
from trackstar.pretraining.checkpoints import WEIGHTS_FILE, TrainingState, read_state
from trackstar.pretraining.optimizers import (
    ADAMW_GRADIENT_NORM,
    make_optimizer,
    optimizer_hyperparameters,
    restore_optimizer,
)

# Adafactor's own: the bound on the root mean square of an update, and the least scale of a parameter.
_CLIP = 1.0
_LEAST_SCALE = 1e-3
_REGULARIZATION = 1e-30


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainingStep:
    """One optimizer step on one example.

    Attributes:
        optimizer: A torch optimizer of the model's own parameters, with its state, and with the learning rate of the
            step set. It is stepped and put back; between measurements its state is what it was.
        loss: Whether the step's loss is the mean or the sum over the example's target tokens.
        max_gradient_norm: The norm to which the whole gradient is cut before the step; None leaves it as it is.
        description: What the step is, for tables.
    """

    optimizer: Optimizer
    loss: Literal["mean", "sum"] = "mean"
    max_gradient_norm: float | None = None
    description: str

    @classmethod
    def from_checkpoint(cls, folder: str | Path, model: LanguageModel) -> "TrainingStep":
        """The step that would have come next in the run of `trackstar pretrain` that left this checkpoint.

        Args:
            folder: The checkpoint: `training_state.json`, `model.safetensors`, and `optimizer.safetensors` (but
                before the first step).
            model: The model of that checkpoint.

        Raises:
            PretrainingError: A file is missing, damaged, of another model, or of an optimizer that this version would
                not make.
            ModelError: The model's weights are not the checkpoint's; the message names a parameter.
        """
        folder = Path(folder)
        state = read_state(folder)
        config = _config(folder, state)
        _check_weights(folder, model)
        optimizer = make_optimizer(model.module, config)
        found, expected = dict(state.optimizer), optimizer_hyperparameters(optimizer)
        if found != expected:
            raise PretrainingError(f"{folder}: was trained with optimizer {found}, expected {expected}; train it anew")
        if state.step > 0:
            path = folder / OPTIMIZER_FILE
            restore_optimizer(model.module, optimizer, _tensors(path), str(path))
        rate = learning_rate(state.step + 1, config)
        for group in optimizer.param_groups:
            group["lr"] = rate
        return cls(
            optimizer=optimizer,
            max_gradient_norm=ADAMW_GRADIENT_NORM if config.optimizer == "adamw" else None,
            description=(
                f"{type(optimizer).__name__} step {state.step + 1:,} of {folder.name}'s run "
                f"(its state, learning rate {rate:.3g})"
            ),
        )

    @classmethod
    def from_optimizer(
        cls, optimizer: Optimizer, model: LanguageModel, *, max_gradient_norm: float | None = None
    ) -> "TrainingStep":
        """The next step of a live optimizer of the model's own parameters, its learning rates as they are set.

        Raises:
            OptionError: It moves something that is no parameter of the model, or no gradient can have that norm.
        """
        if max_gradient_norm is not None and not max_gradient_norm > 0:
            raise OptionError(f"max_gradient_norm is {max_gradient_norm}; expected a number above 0, or None")
        step = cls(
            optimizer=optimizer,
            max_gradient_norm=max_gradient_norm,
            description=f"the next step of a live {type(optimizer).__name__}",
        )
        step.check_model(model)
        return step

    @classmethod
    def from_second_moment(
        cls,
        moment: SecondMoment,
        model: LanguageModel,
        *,
        learning_rate: float = 0.01,
        loss: Literal["mean", "sum"] = "sum",
    ) -> "TrainingStep":
        """Adafactor's relative step with V as it is given, for models without optimizer state.

        Of each covered matrix, W ← W - η·max(ε₂, RMS(W))·U/max(1, RMS(U)) with U = G/√V and ε₂ = 10⁻³ (Shazeer and
        Stern 2018, Algorithm 4, with V not updated by the example). Everything that V does not cover (embeddings,
        head, norms, biases) stays.

        Args:
            moment: A factored V of every covered matrix; entries of its factors below its floor are raised to it.
            model: Whose matrices V is of.
            learning_rate: η, relative to each matrix's root mean square.
            loss: What V's unit is the square of: `sum` for a V that `estimate_second_moment` made of summed losses;
                `mean` for one that a training run on mean losses left.

        Raises:
            SecondMomentError: V does not fit the model.
            OptionError: V is not factored, or the learning rate is not positive.
        """
        if moment.kind != "factored":
            raise OptionError(f"tail-patch: found a second moment of kind {moment.kind}, expected a factored one")
        if not (math.isfinite(learning_rate) and learning_rate > 0):
            raise OptionError(f"tail-patch: found learning rate {learning_rate}, expected a finite number above 0")
        checked_second_moment(moment, model.matrices)
        parameters = dict(model.module.named_parameters())
        optimizer = Adafactor(
            [parameters[matrix.parameter] for matrix in model.matrices],
            lr=learning_rate,
            eps=(_REGULARIZATION, _LEAST_SCALE),
            clip_threshold=_CLIP,
            decay_rate=-math.inf,
            scale_parameter=True,
            relative_step=False,
        )
        for matrix in model.matrices:
            row, column = _stored_factors(matrix, moment)
            parameter = parameters[matrix.parameter]
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            optimizer.state[parameter] = {
                "step": 1,
                "exp_avg_sq_row": row.to(parameter.device, dtype),
                "exp_avg_sq_col": column.to(parameter.device, dtype),
                "RMS": 0.0,
            }
        return cls(
            optimizer=optimizer,
            loss=loss,
            description=(
                f"a relative step of {learning_rate:.3g} as Adafactor's, V {moment.source} and not updated; moves the "
                "attention and MLP matrices alone"
            ),
        )

    def check_model(self, model: LanguageModel) -> None:
        """That the step moves parameters of this very model.

        Raises:
            OptionError: It moves others.
        """
        own = {id(parameter) for parameter in model.module.parameters()}
        for group in self.optimizer.param_groups:
            if any(id(parameter) not in own for parameter in group["params"]):
                raise OptionError(
                    "tail-patch: the training step moves parameters that are not the model's, expected the very model "
                    "that the step was made for"
                )


def _config(folder: Path, state: TrainingState) -> PretrainingConfig:
    try:
        return PretrainingConfig(**state.settings)
    except (TypeError, OptionError) as error:
        raise PretrainingError(
            f"{folder}: its settings are not those of a pretraining run ({error}); restore it from a copy"
        ) from None


def _check_weights(folder: Path, model: LanguageModel) -> None:
    """That the model has the checkpoint's weights: the state of an optimizer belongs to them and no others."""
    path = folder / WEIGHTS_FILE
    weights = _tensors(path)
    for name, parameter in model.module.named_parameters():
        saved = weights.get(name)
        if saved is None or saved.shape != parameter.shape or not (saved.to(parameter) == parameter).all():
            raise ModelError(f"{model.source}: {name} is not what {path} holds; expected the model of that checkpoint")


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise PretrainingError(f"{path}: cannot be read ({reason}); restore it from a copy") from None


def _stored_factors(matrix: WeightMatrix, moment: SecondMoment) -> tuple[Tensor, Tensor]:
    """r and c of V = r cᵀ/mean(r), in the order in which the parameter is stored, small entries raised to the floor."""
    factors = moment.moments[matrix.name]
    if not isinstance(factors, FactoredMoment):
        raise SecondMomentError(f"{moment.source}: second moment of {matrix.name} is not factored; expected r and c")
    row, column = factors.row.double(), factors.column.double()
    row = row.clamp_min(moment.floor * float(row.mean()))
    column = column.clamp_min(moment.floor * float(column.mean()))
    if not matrix.transposed:
        return row, column
    # Stored as Wᵀ: V's rows are the columns there, and V = c rᵀ/mean(r) must be divided by mean(c) instead.
    return column, row * (column.mean() / row.mean())
