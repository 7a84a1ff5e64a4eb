"""The training step that tail-patch makes on a proponent: a real optimizer with its state after training.

The paper (§5.2) continues training from the final checkpoint: one step on the proponent alone, with
the optimizer's state and hyperparameters of pretraining. The step's loss is

    mean    Σ cross-entropies of the example's target tokens / their number    (as in `trackstar.pretraining`)
    sum     Σ cross-entropies of the example's target tokens                   (as for an estimated V)

For a model without optimizer state, V is estimated as E[G²] of summed losses. Its step is
Adafactor's relative step with that V, which the example does not update: β̂₂ = 1 - step^(-∞) = 1
for every step from the second on.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers.optimization import Adafactor

from trackstar.errors import ModelError, OptionError, PretrainingError, SecondMomentError
from trackstar.gradients.second_moment import FactoredMoment, SecondMoment, checked_second_moment
from trackstar.model.devices import in_float64
from trackstar.model.language_model import LanguageModel
from trackstar.model.layer_blocks import WeightMatrix
from trackstar.pretraining import OPTIMIZER_FILE, PretrainingConfig, learning_rate
from trackstar.pretraining.checkpoints import WEIGHTS_FILE, TrainingState, read_state, read_tensors
from trackstar.pretraining.optimizers import (
    ADAMW_GRADIENT_NORM,
    make_optimizer,
    optimizer_hyperparameters,
    restore_optimizer,
)

# Adafactor's defaults: d, the bound on the root mean square of an update; ε₂, the least scale of a
# parameter; ε₁.
_CLIP = 1.0
_LEAST_SCALE = 1e-3
_REGULARIZATION = 1e-30

_ADVICE = "restore it from a copy"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainingStep:
    """One optimizer step on one example.

    Attributes:
        optimizer: A torch optimizer of the model's own parameters, with its state and the step's
            learning rate. Measurements step it, and restore its state.
        loss: Whether the step's loss is the mean or the sum over the example's target tokens.
        max_gradient_norm: The norm to which the whole gradient is clipped before the step; None
            does not clip.
        description: Description of the step, for tables.
    """

    optimizer: Optimizer
    loss: Literal["mean", "sum"] = "mean"
    max_gradient_norm: float | None = None
    description: str

    @classmethod
    def from_checkpoint(cls, folder: str | Path, model: LanguageModel) -> "TrainingStep":
        """The next step of the pretraining run that wrote a checkpoint.

        Args:
            folder: The checkpoint: `training_state.json`, `model.safetensors`, and, after the first step,
                `optimizer.safetensors`.
            model: The model of that checkpoint.

        Raises:
            PretrainingError: A file is missing, damaged, of another model, or of an optimizer that
                this version does not create.
            ModelError: The model's weights are not the checkpoint's; the message names a parameter.
        """
        folder = Path(folder)
        state = read_state(folder)
        config = _config(folder, state)
        _check_weights(folder, model)
        optimizer = make_optimizer(model.module, config)
        of_run, expected = dict(state.optimizer), optimizer_hyperparameters(optimizer)
        if of_run != expected:
            raise PretrainingError(
                f"{folder}: was trained with optimizer {of_run}, expected {expected}; train the model again"
            )
        if state.step > 0:
            path = folder / OPTIMIZER_FILE
            restore_optimizer(model.module, optimizer, read_tensors(path, advice=_ADVICE), str(path))
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
        """The next step of a live optimizer of the model's own parameters, with its current learning rates.

        Raises:
            OptionError: It moves a parameter that is not the model's, or the norm is not positive.
        """
        if max_gradient_norm is not None and not max_gradient_norm > 0:
            raise OptionError(f"`max_gradient_norm`: expected a number above 0, or None, found {max_gradient_norm}")
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
        """Adafactor's relative step with a fixed V, for models without optimizer state.

        For each covered matrix, W ← W - η·max(ε₂, RMS(W))·U/max(1, RMS(U)) with U = G/√V and ε₂ =
        10⁻³ (Shazeer and Stern 2018, Algorithm 4, except that the example does not update V).
        Parameters that V does not cover (embeddings, head, norms, biases) do not move.

        Args:
            moment: A factored V of every covered matrix; entries of its factors below its floor are
                raised to it.
            model: The model that V belongs to.
            learning_rate: η, relative to each matrix's root mean square.
            loss: The loss whose squared gradients V estimates: `sum` for `estimate_second_moment`,
                `mean` for the state of a training run on mean losses.

        Raises:
            SecondMomentError: V does not fit the model.
            OptionError: V is not factored, or the learning rate is not positive.
        """
        if moment.kind != "factored":
            raise OptionError(f"`moment`: expected a factored second moment, found one of kind {moment.kind}")
        if not (math.isfinite(learning_rate) and learning_rate > 0):
            raise OptionError(f"`learning_rate`: expected a finite number above 0, found {learning_rate}")
        moment = checked_second_moment(moment, model.matrices)
        of_parameter: dict[str, list[WeightMatrix]] = {}
        for matrix in model.matrices:
            of_parameter.setdefault(matrix.parameter, []).append(matrix)
        parameters = dict(model.module.named_parameters())
        _check_whole(of_parameter, parameters)
        optimizer = Adafactor(
            [parameters[name] for name in of_parameter],
            lr=learning_rate,
            eps=(_REGULARIZATION, _LEAST_SCALE),
            clip_threshold=_CLIP,
            decay_rate=-math.inf,
            scale_parameter=True,
            relative_step=False,
        )
        for name, matrices in of_parameter.items():
            row, column = _stacked_factors(matrices, moment)
            parameter = parameters[name]
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            optimizer.state[parameter] = {
                "step": 1,
                "exp_avg_sq_row": row.to(dtype).to(parameter.device),
                "exp_avg_sq_col": column.to(dtype).to(parameter.device),
                "RMS": 0.0,
            }
        return cls(
            optimizer=optimizer,
            loss=loss,
            description=(
                f"a relative step of {learning_rate:.3g} as Adafactor's, V {moment.source} and not updated; moves the "
                f"{'adapter' if model.parameters == 'adapter' else 'attention and MLP'} matrices alone"
            ),
        )

    def check_model(self, model: LanguageModel) -> None:
        """Raise if the step moves parameters that are not this model's.

        Raises:
            OptionError: It moves another model's parameters.
        """
        parameters = {id(parameter) for parameter in model.module.parameters()}
        for group in self.optimizer.param_groups:
            if any(id(parameter) not in parameters for parameter in group["params"]):
                raise OptionError(
                    "`step`: moves parameters that are not the model's, expected those of the model object that is "
                    "measured; create the step for this model"
                )


def _config(folder: Path, state: TrainingState) -> PretrainingConfig:
    try:
        return PretrainingConfig(**state.settings)
    except (TypeError, OptionError) as error:
        raise PretrainingError(
            f"{folder}: its settings are not those of a pretraining run ({error}); {_ADVICE}"
        ) from None


def _check_weights(folder: Path, model: LanguageModel) -> None:
    """Raise if the model's weights are not the checkpoint's, which the optimizer's state belongs to."""
    path = folder / WEIGHTS_FILE
    weights = read_tensors(path, advice=_ADVICE)
    for name, parameter in model.module.named_parameters():
        saved = weights.get(name)
        if saved is None or saved.shape != parameter.shape or not (saved.to(parameter) == parameter).all():
            raise ModelError(f"{model.source}: {name} differs from {path}; expected the model of that checkpoint")


def _check_whole(of_parameter: Mapping[str, list[WeightMatrix]], parameters: Mapping[str, Tensor]) -> None:
    """Raise if only some experts of a parameter are in the layer blocks: a step would move all of them."""
    for name, matrices in of_parameter.items():
        experts = len(parameters[name]) if matrices[0].expert is not None else 1
        if len(matrices) != experts:
            raise SecondMomentError(
                f"{name}: V is known of {len(matrices)} of its {experts} experts, expected all of them for a step; "
                "match all experts with `mlp_pattern`"
            )


def _stacked_factors(matrices: list[WeightMatrix], moment: SecondMoment) -> tuple[Tensor, Tensor]:
    """`_stored_factors` of a parameter: [rows] and [columns], or [experts, rows] and [experts, columns]."""
    if matrices[0].expert is None:
        return _stored_factors(matrices[0], moment)
    factors = [_stored_factors(matrix, moment) for matrix in sorted(matrices, key=lambda matrix: matrix.expert or 0)]
    row, column = zip(*factors, strict=True)
    return torch.stack(row), torch.stack(column)


def _stored_factors(matrix: WeightMatrix, moment: SecondMoment) -> tuple[Tensor, Tensor]:
    """r and c of V = r cᵀ/mean(r) in the parameter's stored order, entries below the floor raised to it."""
    factors = moment.moments[matrix.name]
    if not isinstance(factors, FactoredMoment):
        raise SecondMomentError(f"{moment.source}: second moment of {matrix.name} is not factored; expected r and c")
    row, column = in_float64(factors.row), in_float64(factors.column)
    row = row.clamp_min(moment.floor * float(row.mean()))
    column = column.clamp_min(moment.floor * float(column.mean()))
    if not matrix.transposed:
        return row, column
    # Stored as Wᵀ: Vᵀ = c rᵀ/mean(r) = c (r·mean(c)/mean(r))ᵀ/mean(c).
    return column, row * (column.mean() / row.mean())
