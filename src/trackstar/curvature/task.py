"""R for a task: λ and damping chosen, R_eval and R_train mixed, and the whitening that follows (Eq. 2-3).

An index in projected coordinates is whitened by R = λR_eval + (1-λ)R_train itself. One in whitened coordinates has been
whitened by R_train when it was made; what is left for the task is of low rank (`task_whitening.py`).
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from trackstar.curvature.autocorrelation import autocorrelation
from trackstar.curvature.low_rank import TaskWhitening
from trackstar.curvature.mixing import (
    MIN_TASK_QUERIES,
    Mixing,
    mixed,
    mixing_by_spectra,
    spectrum_of_autocorrelation,
    spectrum_of_examples,
)
from trackstar.curvature.whitening import Whitening, shrinkage_damping, whitening
from trackstar.errors import DamagedIndexError, OptionError
from trackstar.store import Index, Manifest, Place, StoredRows

# To be changed with the arithmetic of norms and scores: what an earlier one has kept with an index is not taken up.
_KEPT_AS = b"2"


@runtime_checkable
class StoredWhitening(Protocol):
    """What is left to whiten rows with that are in an index's own coordinates."""

    def apply_inverse(self, rows: Float[Tensor, "rows dimensions"], /) -> Float[Tensor, "rows dimensions"]:
        """R⁻¹ in these coordinates: a query in this form meets candidates as stored."""
        ...

    def norms(self, rows: Float[Tensor, "rows dimensions"], /) -> Float[Tensor, "rows"]:
        """The norm of Eq. 1 of each row."""
        ...

    def stored_norms(self, stored: StoredRows, /) -> Float[Tensor, "rows"]:
        """The same of rows as their codes have them."""
        ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TaskCorrection:
    """R for a task, ready to whiten with (Eq. 3).

    Attributes:
        mixing: λ, its rule and spectra.
        damping: Fraction of each block's mean eigenvalue that was added to R_train.
        damping_rule: In words, where the damping comes from.
        whitening: By R, of rows in the index's coordinates.
        train: W_train, which leads to the index's coordinates where they are whitened.
        key: Names this R among all that the index may be asked with.
    """

    mixing: Mixing
    damping: float
    damping_rule: str
    whitening: StoredWhitening
    train: Whitening | None
    key: str

    def coordinates(self, phi: Float[Tensor, "rows dimensions"]) -> Float[Tensor, "rows dimensions"]:
        """φ in the index's coordinates."""
        return phi if self.train is None else self.train.apply(phi)

    def gradient_vectors(self, vectors: Float[Tensor, "rows dimensions"]) -> Float[Tensor, "rows dimensions"]:
        """What φ must meet for the inner products that vectors have with rows in the index's coordinates."""
        return vectors if self.train is None else self.train.apply_transposed(vectors)


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
        damping: Fraction of a block's mean eigenvalue added to R_train; None is chosen by `shrinkage_damping`, or is
            what a whitened index was made with.

    Raises:
        OptionError: λ or the damping is out of range, or not that of a whitened index.
        CurvatureError: R cannot be inverted.
    """
    check_choices(index, mixing=mixing, damping=damping)
    blocks = len(index.manifest.layer_blocks)
    chosen = choose_mixing(task, lambda: train_spectrum(index), blocks=blocks, given=mixing)
    entry = index.manifest.whitening
    if entry is None:
        r_train = stored_matrices(index, "autocorrelation")
        names = [block.name for block in index.manifest.layer_blocks]
        return mixed_correction(
            r_train, index.rows, task, chosen, damping=damping, names=names, made_of=index.manifest.to_json()
        )
    train = train_whitening(index)
    u = train.apply(task) if len(task) and chosen.value > 0 else task
    return TaskCorrection(
        mixing=chosen,
        damping=entry.damping,
        damping_rule=f"whitened at indexing by R_train, {entry.source}",
        whitening=TaskWhitening.of(u, blocks=blocks, mixing=chosen.value),
        train=train,
        key=_key(index.manifest.to_json(), task, chosen.value, entry.damping),
    )


def check_choices(index: Index, *, mixing: float | None, damping: float | None) -> None:
    """See that an index can be asked with this λ and damping; None is always good.

    Raises:
        OptionError: One is out of range, or not that of a whitened index.
    """
    check_mixing(mixing)
    if damping is not None and not 0 <= damping < math.inf:
        raise OptionError(f"--damping {damping}: expected 0 or more, as a fraction of the mean eigenvalue")
    entry = index.manifest.whitening
    if entry is None:
        return
    if mixing == 1:
        raise OptionError(
            f"--mixing {mixing}: expected a number from 0 to less than 1 for {index.path}, whose whitened coordinates "
            "R_train has shaped; for R_eval alone, index with --coordinates projected and --codec float16"
        )
    if damping is not None and damping != entry.damping:
        raise OptionError(
            f"--damping {damping}: {index.path} is whitened by R_train with damping {entry.damping:g}; leave the "
            "option out, or convert the projected index again with another (trackstar convert --damping)"
        )


def check_mixing(mixing: float | None) -> None:
    """See that λ, where it is given, is from 0 to 1.

    Raises:
        OptionError: It is not.
    """
    if mixing is not None and not 0 <= mixing <= 1:
        raise OptionError(f"--mixing {mixing}: expected a number from 0 (only R_train) to 1 (only R_eval)")


def train_whitening(index: Index) -> Whitening:
    """W_train of an index in whitened coordinates.

    Raises:
        DamagedIndexError: It is missing, not what was written, or no matrix a layer block.
    """
    return Whitening(factors=stored_matrices(index, "whitening"), triangular=False)


def stored_matrices(index: Index, name: str) -> Float[Tensor, "blocks dim dim"]:
    """`autocorrelation` or `whitening` of an index.

    Raises:
        DamagedIndexError: It is missing, not what was written, or no matrix of finite numbers a layer block.
    """
    return checked_matrices(index.tensors(name), name, index.path, index.manifest)


def checked_matrices(
    tensors: Mapping[str, Tensor], name: str, path: Place, manifest: Manifest
) -> Float[Tensor, "blocks dim dim"]:
    """`autocorrelation` or `whitening` among the tensors of that file of the index at `path`.

    Raises:
        DamagedIndexError: It is no matrix of finite numbers a layer block.
    """
    dim = manifest.projection.side**2
    expected = (len(manifest.layer_blocks), dim, dim)
    found = tensors.get(name)
    file = path / f"{name}.safetensors"
    if found is None or found.dtype is not torch.float32 or tuple(found.shape) != expected:
        what = "no tensor of that name" if found is None else f"{found.dtype} {list(found.shape)}"
        raise DamagedIndexError(f"{file}: holds {what}, expected float32 {list(expected)}; make the index again")
    if not torch.isfinite(found).all():
        raise DamagedIndexError(f"{file}: holds numbers that are not finite; make the index again")
    return found


def mixed_correction(
    r_train: Float[Tensor, "blocks dim dim"],
    examples: int,
    task: Float[Tensor, "queries dimensions"],
    mixing: Mixing,
    *,
    damping: float | None,
    names: Sequence[str],
    made_of: str,
) -> TaskCorrection:
    """The correction of φ itself: R mixed, damped and inverted as a whole.

    Args:
        r_train: R_train.
        examples: How many examples it is the mean of.
        task: φ of the task's queries.
        mixing: λ.
        damping: Fraction of a block's mean eigenvalue added to R; None is chosen by `shrinkage_damping`.
        names: The layer blocks' names.
        made_of: What names R_train among all others.

    Raises:
        CurvatureError: R cannot be inverted.
    """
    rule = "given"
    if damping is None:
        damping = shrinkage_damping(r_train, examples)
        rule = f"shrinkage of R_train as a mean over {examples:,} examples"
    r = r_train
    if mixing.value > 0:
        r = mixed(autocorrelation(task, len(r_train)), r_train, mixing.value)
    return TaskCorrection(
        mixing=mixing,
        damping=damping,
        damping_rule=rule,
        whitening=whitening(r, damping=damping, names=names),
        train=None,
        key=_key(made_of, task, mixing.value, damping),
    )


def _key(made_of: str, task: Tensor, mixing: float, damping: float) -> str:
    parts = [_KEPT_AS, made_of.encode(), f"{mixing!r} {damping!r}".encode()]
    if mixing > 0:
        parts.append(task.contiguous().numpy().tobytes())
    return hashlib.blake2b(b"\0".join(parts), digest_size=16).hexdigest()


def train_spectrum(index: Index) -> Float[Tensor, "eigenvalues"]:
    """R_train's singular values, all blocks pooled, descending; kept with the index."""
    kept = (index.load_derived("train-spectrum") or {}).get("values")
    if kept is not None and kept.is_floating_point() and kept.ndim == 1 and torch.isfinite(kept).all():
        return kept
    blocks = len(index.manifest.layer_blocks)
    entry = index.manifest.whitening
    if entry is not None:
        values = spectrum_of_autocorrelation(train_whitening(index).autocorrelation(entry.damping))
    elif index.rows < index.dimensions // blocks:
        phi = torch.cat([chunk.stored.decode() for chunk in index.iterate(1024)])
        values = spectrum_of_examples(phi, blocks)
    else:
        values = spectrum_of_autocorrelation(stored_matrices(index, "autocorrelation"))
    index.save_derived("train-spectrum", {"values": values})
    return values


def choose_mixing(
    task: Float[Tensor, "queries dimensions"],
    spectrum: Callable[[], Float[Tensor, "eigenvalues"]],
    *,
    blocks: int,
    given: float | None,
) -> Mixing:
    """λ as given, or by the paper's rule where the task has queries enough.

    Args:
        task: φ of the task's queries.
        spectrum: Gives R_train's singular values, all blocks pooled; called where the rule needs them.
        blocks: Number of layer blocks.
        given: λ; None follows the rule.

    Raises:
        OptionError: λ is out of range, or there is a λ and no task.
    """
    check_mixing(given)
    if given is not None:
        if given > 0 and not len(task):
            raise OptionError(f"--mixing {given}: no query says what R_eval is; give some (--task)")
        return Mixing(value=given, rule="given", queries=len(task))
    if len(task) < MIN_TASK_QUERIES:
        rule = f"only R_train: a task needs {MIN_TASK_QUERIES} queries or more (--task), found {len(task)}"
        return Mixing(value=0.0, rule=rule, queries=len(task))
    evaluation = spectrum_of_examples(task, blocks)
    return mixing_by_spectra(evaluation, spectrum(), dimensions=task.shape[1], queries=len(task))
