"""The correction for a task: λ and damping are chosen, R_eval and R_train mixed, and R is inverted
(Eq. 2-3).

In every index R = λ R_eval + (1-λ)(R_train + cI). An index in projected coordinates is whitened by
R when it is queried. An index in whitened coordinates was whitened by R_train + cI when it was
built; the task's part is a low-rank change (`low_rank.py`).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from trackstar.corpus.digests import digest_of_fields
from trackstar.curvature.low_rank import TaskWhitening
from trackstar.curvature.low_rank_whitening import LowRankWhitening
from trackstar.curvature.mixing import (
    MIN_TASK_QUERIES,
    Mixing,
    mixing_by_spectra,
    spectrum_of_examples,
)
from trackstar.curvature.train_autocorrelation import FewExamples, SquareAutocorrelation, TrainAutocorrelation
from trackstar.curvature.whitening import AnyWhitening, Whitening
from trackstar.errors import DamagedIndexError, OptionError, check_damping, check_mixing
from trackstar.store import Index, Manifest, Place, StoredRows, have_shapes

# Version of the arithmetic of norms and scores. Results that an index caches under another version
# are not read.
_CACHE_VERSION = b"3"
_TRAIN_WHITENING = "train-whitening-3"


@runtime_checkable
class StoredWhitening(Protocol):
    """Whitening of rows in an index's coordinates, projected or whitened."""

    def apply_inverse(self, rows: Float[Tensor, "rows dimensions"], /) -> Float[Tensor, "rows dimensions"]:
        """R⁻¹ times each row, in these coordinates: its inner products with stored rows are those
        of Eq. 2.
        """
        ...

    def norms(self, rows: Float[Tensor, "rows dimensions"], /) -> Float[Tensor, "rows"]:
        """Norm of each row under R, as Eq. 1 divides by it."""
        ...

    def stored_norms(self, stored: StoredRows, /) -> Float[Tensor, "rows"]:
        """Norm of each stored row under R, from its codes."""
        ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TaskCorrection:
    """R for a task, inverted (Eq. 3).

    Attributes:
        mixing: λ, its rule and spectra.
        damping: Ridge added to R_train, as a fraction of its mean eigenvalue per block.
        damping_rule: The source of the damping, in words.
        whitening: Whitens rows in the index's coordinates.
        train: W_train, if the index's coordinates are whitened.
        key: Identifies this R among all that the index may be queried with.
    """

    mixing: Mixing
    damping: float
    damping_rule: str
    whitening: StoredWhitening
    train: AnyWhitening | None
    key: str

    def coordinates(self, phi: Float[Tensor, "rows dimensions"]) -> Float[Tensor, "rows dimensions"]:
        """φ in the index's coordinates."""
        return phi if self.train is None else self.train.apply(phi)

    def gradient_vectors(self, vectors: Float[Tensor, "rows dimensions"]) -> Float[Tensor, "rows dimensions"]:
        """Vectors whose inner products with φ equal those of the given vectors with rows in the
        index's coordinates.
        """
        return vectors if self.train is None else self.train.apply_transposed(vectors)


def task_correction(
    index: Index,
    task: Float[Tensor, "queries dimensions"],
    *,
    mixing: float | None = None,
    damping: float | None = None,
) -> TaskCorrection:
    """R = λ R_eval + (1-λ)(R_train + cI) for a task, inverted (Eq. 2-3).

    Args:
        index: The index, for its R_train.
        task: φ of the queries that R_eval is computed from.
        mixing: λ; None follows the paper's rule, or is 0 with fewer queries than
            `MIN_TASK_QUERIES`.
        damping: Ridge c added to R_train, as a fraction of its mean eigenvalue per block; None is
            chosen by `shrinkage_damping`. A whitened index has the damping that it was built with.

    Raises:
        OptionError: λ or the damping is out of range, or not that of a whitened index.
        CurvatureError: R cannot be inverted.
    """
    check_choices(index, mixing=mixing, damping=damping)
    blocks = len(index.manifest.layer_blocks)
    chosen = choose_mixing(task, lambda: train_spectrum(index), blocks=blocks, given=mixing)
    entry = index.manifest.whitening
    if entry is None:
        if chosen.value == 0 and damping is None:
            return _train_correction(index, task, chosen)
        names = [block.name for block in index.manifest.layer_blocks]
        return mixed_correction(
            train_autocorrelation(index), task, chosen, damping=damping, names=names, source=index.manifest.to_json()
        )
    train = train_whitening(index)
    u = train.apply(task) if len(task) and chosen.value > 0 else task
    return TaskCorrection(
        mixing=chosen,
        damping=entry.damping,
        damping_rule=f"fixed when the index was built, with R_train {entry.source}",
        whitening=TaskWhitening.of(u, blocks=blocks, mixing=chosen.value),
        train=train,
        key=_key(index.manifest.to_json(), task, chosen.value, entry.damping),
    )


def check_choices(index: Index, *, mixing: float | None, damping: float | None) -> None:
    """Raise if an index cannot be queried with this λ or damping; None is always accepted.

    Raises:
        OptionError: λ or the damping is out of range, or a whitened index was built with another
            damping.
    """
    check_mixing(mixing)
    check_damping(damping)
    entry = index.manifest.whitening
    if entry is None:
        return
    if mixing == 1:
        raise OptionError(
            f"`mixing`: expected 0 to less than 1 for {index.path}, whose coordinates are whitened by R_train, found "
            f'{mixing}; for R_eval alone, build the index with `coordinates="projected"` and `codec="float16"`'
        )
    if damping is not None and damping != entry.damping:
        raise OptionError(
            f"`damping`: expected {entry.damping!r}, with which {index.path} was whitened by R_train, found {damping}; "
            "leave `damping` out, or call `convert_index` with this `damping` on an index in projected coordinates"
        )


def train_whitening(index: Index) -> AnyWhitening:
    """W_train of an index in whitened coordinates.

    Raises:
        DamagedIndexError: W_train is missing, not as it was written, or not one matrix per layer
            block.
    """
    return checked_whitening(index.tensors("whitening"), index.path, index.manifest)


def train_autocorrelation(index: Index) -> TrainAutocorrelation:
    """R_train of an index in projected coordinates: the stored matrices, or the rows of few examples.

    Raises:
        DamagedIndexError: R_train is missing, not as it was written, or not one finite matrix per
            layer block.
    """
    manifest, blocks = index.manifest, len(index.manifest.layer_blocks)
    stored = manifest.completion is None or manifest.completion.autocorrelation_digest is not None
    if not stored:
        return FewExamples(phi=torch.cat([chunk.stored.decode() for chunk in index.iterate(1024)]), blocks=blocks)
    dim = manifest.projection.side**2
    found = index.tensors("autocorrelation")
    matrices = _checked(found, "autocorrelation", (blocks, dim, dim), index.path / "autocorrelation.safetensors")
    return SquareAutocorrelation(matrices=matrices, examples=index.rows)


def checked_whitening(tensors: Mapping[str, Tensor], path: Place, manifest: Manifest) -> AnyWhitening:
    """W_train, from the tensors of whitening.safetensors in the index at `path`.

    Raises:
        DamagedIndexError: A tensor is missing, not finite or of another shape than the manifest's.
    """
    file = path / "whitening.safetensors"
    dim, blocks, entry = manifest.projection.side**2, len(manifest.layer_blocks), manifest.whitening
    assert entry is not None, "the index's coordinates are whitened"
    if entry.rank is None:
        return Whitening(factors=_checked(tensors, "whitening", (blocks, dim, dim), file), triangular=False)
    ridges = _checked(tensors, "ridges", (blocks,), file)
    values = _checked(tensors, "values", (blocks, entry.rank), file)
    if not (ridges > 0).all() or not (values >= 0).all():
        raise DamagedIndexError(f"{file}: expected positive ridges and no negative value; build the index again")
    return LowRankWhitening(
        directions=_checked(tensors, "directions", (blocks, entry.rank, dim), file),
        values=values, ridges=ridges, seed=manifest.projection.seed,
    )  # fmt: skip


def _checked(tensors: Mapping[str, Tensor], name: str, expected: tuple[int, ...], file: Place) -> Tensor:
    """A float32 tensor of an index's file, if its shape is the expected one and its entries are finite.

    Raises:
        DamagedIndexError: It is missing, or not so.
    """
    found = tensors.get(name)
    if found is None or found.dtype is not torch.float32 or tuple(found.shape) != expected:
        what = f"no tensor `{name}`" if found is None else f"{found.dtype} {list(found.shape)} for `{name}`"
        raise DamagedIndexError(f"{file}: expected float32 {list(expected)}, found {what}; build the index again")
    if not all(bool(torch.isfinite(block).all()) for block in found):  # its temporary tensors are of a block
        raise DamagedIndexError(f"{file}: expected finite numbers, found NaN or infinite ones; build the index again")
    return found


def _train_correction(index: Index, task: Tensor, mixing: Mixing) -> TaskCorrection:
    """The correction by R_train alone, which is fixed for an index in projected coordinates: it is computed
    once, and kept.
    """
    manifest = index.manifest
    saved = index.load_derived(_TRAIN_WHITENING) or {}
    found = _kept_whitening(saved, manifest)
    if found is not None:
        damping = float(saved["damping"])
        return TaskCorrection(
            mixing=mixing, damping=damping, damping_rule=_shrinkage_rule(index.rows), whitening=found, train=None,
            key=_key(manifest.to_json(), task, 0.0, damping),
        )  # fmt: skip
    names = [block.name for block in manifest.layer_blocks]
    correction = mixed_correction(
        train_autocorrelation(index), task, mixing, damping=None, names=names, source=manifest.to_json()
    )
    whitening = correction.whitening
    if isinstance(whitening, (Whitening, LowRankWhitening)):
        damping = torch.tensor(correction.damping, dtype=torch.float64)
        index.save_derived(_TRAIN_WHITENING, {"damping": damping, **whitening.tensors()})
    return correction


def _kept_whitening(saved: Mapping[str, Tensor], manifest: Manifest) -> AnyWhitening | None:
    """The whitening that `_train_correction` saved; None if it is none."""
    dim, blocks = manifest.projection.side**2, len(manifest.layer_blocks)
    if not have_shapes(saved, damping=()) or saved["damping"].dtype is not torch.float64:
        return None
    if not all(tensor.dtype is torch.float32 for name, tensor in saved.items() if name != "damping"):
        return None
    if have_shapes(saved, whitening=(blocks, dim, dim)):
        return Whitening(factors=saved["whitening"])
    rank = saved["values"].shape[-1] if "values" in saved and saved["values"].ndim == 2 else -1
    if have_shapes(saved, directions=(blocks, rank, dim), values=(blocks, rank), ridges=(blocks,)):
        return LowRankWhitening(directions=saved["directions"], values=saved["values"], ridges=saved["ridges"])
    return None


def _shrinkage_rule(examples: int) -> str:
    return f"shrinkage of R_train as a mean over {examples:,} examples"


def mixed_correction(
    r_train: TrainAutocorrelation,
    task: Float[Tensor, "queries dimensions"],
    mixing: Mixing,
    *,
    damping: float | None,
    names: Sequence[str],
    source: str,
) -> TaskCorrection:
    """The correction in projected coordinates: R itself is inverted.

    Args:
        r_train: R_train.
        task: φ of the task's queries.
        mixing: λ.
        damping: Ridge added to R_train, as a fraction of its mean eigenvalue per block; None is
            chosen by `shrinkage_damping`.
        names: Names of the layer blocks, for errors.
        source: Text that identifies R_train, for the correction's key.

    Raises:
        CurvatureError: R cannot be inverted.
    """
    rule = "given"
    if damping is None:
        damping = r_train.shrinkage()
        rule = _shrinkage_rule(r_train.examples)
    return TaskCorrection(
        mixing=mixing,
        damping=damping,
        damping_rule=rule,
        whitening=r_train.whitening(task, mixing=mixing.value, damping=damping, names=names),
        train=None,
        key=_key(source, task, mixing.value, damping),
    )


def _key(source: str, task: Tensor, mixing: float, damping: float) -> str:
    parts = [_CACHE_VERSION, source.encode(), f"{mixing!r} {damping!r}".encode()]
    if mixing > 0:
        parts.append(task.contiguous().numpy().tobytes())
    return digest_of_fields(*parts)


def train_spectrum(index: Index) -> Float[Tensor, "eigenvalues"]:
    """R_train's singular values, all blocks pooled, descending; cached with the index."""
    cached = (index.load_derived("train-spectrum") or {}).get("values")
    if cached is not None and cached.is_floating_point() and cached.ndim == 1 and torch.isfinite(cached).all():
        return cached
    entry = index.manifest.whitening
    if entry is not None:
        values = train_whitening(index).spectrum(entry.damping)
    elif index.rows < index.manifest.projection.side**2:
        phi = torch.cat([chunk.stored.decode() for chunk in index.iterate(1024)])
        values = spectrum_of_examples(phi, len(index.manifest.layer_blocks))
    else:
        values = train_autocorrelation(index).spectrum()
    index.save_derived("train-spectrum", {"values": values})
    return values


def choose_mixing(
    task: Float[Tensor, "queries dimensions"],
    spectrum: Callable[[], Float[Tensor, "eigenvalues"]],
    *,
    blocks: int,
    given: float | None,
) -> Mixing:
    """λ as given, or by the paper's rule if the task has enough queries.

    Args:
        task: φ of the task's queries.
        spectrum: Returns R_train's singular values, all blocks pooled; called only if the rule
            needs them.
        blocks: Number of layer blocks.
        given: λ; None follows the rule.

    Raises:
        OptionError: λ is out of range, or above 0 without a task.
    """
    check_mixing(given)
    if given is not None:
        if given > 0 and not len(task):
            raise OptionError(
                f"`mixing`: expected 0 without queries that R_eval comes from, found {given}; pass `task`"
            )
        return Mixing(value=given, rule="given", queries=len(task))
    if len(task) < MIN_TASK_QUERIES:
        rule = f"R_train alone: R_eval needs {MIN_TASK_QUERIES} queries or more in `task`, found {len(task)}"
        return Mixing(value=0.0, rule=rule, queries=len(task))
    evaluation = spectrum_of_examples(task, blocks)
    return mixing_by_spectra(evaluation, spectrum(), dimensions=task.shape[1], queries=len(task))
