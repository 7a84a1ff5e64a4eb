"""Labelled images as rows of features, and features that have nothing to do with the label."""

import dataclasses
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from trackstar.errors import CorpusError

LARGEST_FILE = 2**31
"""Most bytes of a file of images, and of its content."""
_NPZ = "expected an .npz file with the arrays x (images) and y (their classes, from 0)"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Images:
    """Labelled images.

    Attributes:
        features: One row per image: its pixels, and nuisance features if there are any.
        labels: The class of each image, from 0.
    """

    features: Float[Tensor, "images features"]
    labels: Int64[Tensor, "images"]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def classes(self) -> int:
        """Number of classes, by the largest label."""
        return int(self.labels.max()) + 1

    def part(self, rows: Int64[Tensor, "rows"] | slice) -> "Images":
        """Some of the images."""
        return Images(features=self.features[rows], labels=self.labels[rows])

    def labelled(self, labels: Int64[Tensor, "images"]) -> "Images":
        """The same images with other labels."""
        return Images(features=self.features, labels=labels)

    def with_nuisance(self, count: int, scale: float, generator: torch.Generator) -> "Images":
        """The images with further features: normal numbers of this standard deviation, whatever the label."""
        nuisance = scale * torch.randn(len(self), count, generator=generator)
        return Images(features=torch.cat([self.features, nuisance], dim=1), labels=self.labels)


def digits() -> Images:
    """The 1,797 images of 8 × 8 pixels that scikit-learn holds, with pixels from 0 to 1."""
    from sklearn.datasets import load_digits  # pyright: ignore[reportMissingImports, reportMissingTypeStubs]

    loaded: Any = load_digits()
    pixels = torch.from_numpy(loaded.data).float() / 16
    return Images(features=pixels, labels=torch.from_numpy(loaded.target).long())


def read_images(path: Path) -> Images:
    """Images from an .npz file, such as MNIST's: `x` with an image per row, of any shape, `y` with classes.

    Whole numbers are divided by 255; other numbers are taken as they are.

    Raises:
        CorpusError: The file is no such file; the message names it and what is wrong.
    """
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise CorpusError(f"{path}: has more than {LARGEST_FILE >> 30} GiB; {_NPZ}; take fewer images")
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > LARGEST_FILE:
                raise CorpusError(f"{path}: holds more than {LARGEST_FILE >> 30} GiB; {_NPZ}; take fewer images")
        with np.load(path, allow_pickle=False) as arrays:
            x, y = arrays["x"], arrays["y"]
    except KeyError as error:
        raise CorpusError(f"{path}: has no array {error.args[0].split()[0]}; {_NPZ}; name them so") from None
    except FileNotFoundError:
        raise CorpusError(f"{path}: no such file; {_NPZ}; check the path") from None
    except (OSError, ValueError, zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise CorpusError(f"{path}: cannot be read ({type(error).__name__}); {_NPZ}; write it again") from None
    return _checked(x, y, path)


def _checked(x: np.ndarray, y: np.ndarray, path: Path) -> Images:
    if x.ndim < 2 or x.dtype.kind not in "uif" or x.size == 0:
        raise CorpusError(f"{path}: x is {_shown(x)}; expected one image of numbers per row; {_NPZ}")
    if y.shape != x.shape[:1] or y.dtype.kind not in "ui":
        raise CorpusError(f"{path}: y is {_shown(y)}; expected {len(x)} whole numbers, one per image; {_NPZ}")
    features = torch.from_numpy(x.reshape(len(x), -1).astype(np.float32))
    if x.dtype.kind in "ui":
        features /= 255
    if not torch.isfinite(features).all():
        raise CorpusError(f"{path}: x holds NaN or infinite numbers; expected finite ones; {_NPZ}")
    labels = y.astype(np.int64)
    counts = np.bincount(labels) if labels.min() >= 0 and labels.max() < len(labels) else np.zeros(1)
    if len(counts) < 2 or not counts.all():
        raise CorpusError(
            f"{path}: y has classes from {labels.min()} to {labels.max()}; expected 0, 1 ... without gaps"
        )
    return Images(features=features, labels=torch.from_numpy(labels))


def _shown(array: np.ndarray) -> str:
    return f"an array of {array.dtype} with shape {array.shape}"
