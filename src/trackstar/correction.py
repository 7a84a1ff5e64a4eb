"""R for a task: λ and damping chosen, R_eval and R_train mixed, and the whitening that follows (Eq. 2-3)."""

import dataclasses
import hashlib

import torch
from jaxtyping import Float
from torch import Tensor

from trackstar.curvature import (
    MIN_TASK_QUERIES,
    Mixing,
    Whitening,
    autocorrelation,
    mixed,
    mixing_by_spectra,
    shrinkage_damping,
    spectrum_of_autocorrelation,
    spectrum_of_examples,
    whitening,
)
from trackstar.errors import OptionError
from trackstar.store import Index, decode


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TaskCorrection:
    """R for a task, ready to whiten with (Eq. 3).

    Attributes:
        mixing: λ, its rule and spectra.
        damping: Fraction of each block's mean eigenvalue that was added.
        damping_rule: In words, where the damping comes from.
        whitening: W with WᵀW = R⁻¹.
        key: Names this R among all that the index may be asked with.
    """

    mixing: Mixing
    damping: float
    damping_rule: str
    whitening: Whitening
    key: str


def task_correction(
    index: Index,
    task: Float[Tensor, "queries dimensions"],
    *,
    mixing: float | None = None,
    damping: float | None = None,
) -> TaskCorrection:
    """R = λ R_eval + (1-λ) R_train for the task that these queries' φ stand for, inverted (Eq. 2-3).

    Args:
        index: Whose R_train it is.
        task: φ of the queries that R_eval is the mean of.
        mixing: λ; None follows the paper's rule, or is 0 where there are fewer than `MIN_TASK_QUERIES`.
        damping: Fraction of a block's mean eigenvalue added to R; None is chosen by `shrinkage_damping`.

    Raises:
        OptionError: λ or the damping is out of range.
        CurvatureError: R cannot be inverted.
    """
    blocks = len(index.manifest.layer_blocks)
    r_train = index.tensors("autocorrelation")["autocorrelation"]
    chosen = _mixing(index, task, mixing)
    rule = "given"
    if damping is None:
        damping = shrinkage_damping(r_train, index.rows)
        rule = f"shrinkage of R_train as a mean over {index.rows:,} examples"
    parts = [index.manifest.to_json().encode(), f"{chosen.value!r} {damping!r}".encode()]
    r = r_train
    if chosen.value > 0:
        parts.append(task.contiguous().numpy().tobytes())
        r = mixed(autocorrelation(task, blocks), r_train, chosen.value)
    names = [block.name for block in index.manifest.layer_blocks]
    return TaskCorrection(
        mixing=chosen,
        damping=damping,
        damping_rule=rule,
        whitening=whitening(r, damping=damping, names=names),
        key=hashlib.blake2b(b"\0".join(parts), digest_size=16).hexdigest(),
    )


def train_spectrum(index: Index) -> Float[Tensor, "eigenvalues"]:
    """R_train's singular values, all blocks pooled, descending; kept with the index."""
    kept = index.load_derived("train-spectrum")
    if kept is not None:
        return kept["values"]
    blocks = len(index.manifest.layer_blocks)
    if index.rows < index.dimensions // blocks:
        phi = torch.cat([decode(chunk.codes, chunk.scales) for chunk in index.iterate(1024)])
        values = spectrum_of_examples(phi, blocks)
    else:
        values = spectrum_of_autocorrelation(index.tensors("autocorrelation")["autocorrelation"])
    index.save_derived("train-spectrum", {"values": values})
    return values


def _mixing(index: Index, task: Tensor, given: float | None) -> Mixing:
    if given is not None:
        if not 0 <= given <= 1:
            raise OptionError(f"--mixing {given}: expected a number from 0 (only R_train) to 1 (only R_eval)")
        return Mixing(value=given, rule="given", queries=len(task))
    if len(task) < MIN_TASK_QUERIES:
        rule = f"only R_train: a task needs {MIN_TASK_QUERIES} queries or more (--task), found {len(task)}"
        return Mixing(value=0.0, rule=rule, queries=len(task))
    evaluation = spectrum_of_examples(task, len(index.manifest.layer_blocks))
    return mixing_by_spectra(evaluation, train_spectrum(index), dimensions=index.dimensions, queries=len(task))
