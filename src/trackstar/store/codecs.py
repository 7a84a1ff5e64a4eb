"""Encode rows of coordinates as the numbers that a shard stores, and decode them.

float32, bfloat16, float16: codes c and one scale s per row, a power of two: row ≈ c·s.
Multiplication by a power of two is exact, so the only rounding is that of the codec's number
format, and a row of any magnitude fits the format.

int8, 4-bit, 2-bit, 1-bit: integer codes and one factor per layer block, which makes inner products
unbiased; see `quantization.py`. These codecs need whitened coordinates.
"""

import dataclasses
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Float32, Shaped
from torch import Tensor

from trackstar.choices import CODECS, LOW_BIT_CODECS, CodecName
from trackstar.errors import check_choice
from trackstar.store.quantization import Bits, dequantize, quantize

_FLOAT_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_BITS: dict[str, Bits] = {"int8": 8, "4-bit": 4, "2-bit": 2, "1-bit": 1}
assert {*_FLOAT_DTYPES, *_BITS} == set(CODECS)
assert _BITS.keys() == set(LOW_BIT_CODECS)

# With these exponents a scale and its inverse are both normal float32 numbers.
SMALLEST_EXPONENT, LARGEST_EXPONENT = -126, 126


def quantized_bits(codec: CodecName) -> Bits | None:
    """Bits per dimension of a low-bit codec; None for a floating-point codec."""
    return _BITS.get(codec)


def codec_bits(codec: CodecName) -> int:
    """Bits per dimension."""
    return _BITS[codec] if codec in _BITS else _FLOAT_DTYPES[codec].itemsize * 8


def codec_dtype(codec: CodecName) -> torch.dtype:
    """Dtype of a codec's codes."""
    return _FLOAT_DTYPES.get(codec, torch.uint8)


def code_columns(codec: CodecName, dimensions: int) -> int:
    """Number of elements in a row of codes: one per dimension, or one per byte of packed codes."""
    return dimensions * _BITS[codec] // 8 if codec in _BITS else dimensions


def scales_shape(codec: CodecName, rows: int, blocks: int) -> tuple[int, ...]:
    """Shape of the scales: one per row, or for low-bit codecs one per row and layer block."""
    return (rows, blocks) if codec in _BITS else (rows,)


def row_bytes(codec: CodecName, dimensions: int, blocks: int) -> int:
    """Bytes of a stored row: codes, scales and norm, without its tokens and text."""
    scales = blocks if codec in _BITS else 1
    return code_columns(codec, dimensions) * codec_dtype(codec).itemsize + 4 * scales + 4


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredRows:
    """Encoded rows of coordinates, as a shard stores them.

    Attributes:
        codec: The codec.
        codes: Numbers in the codec's format [rows, dim], or packed codes [rows, bytes].
        scales: A power of two per row [rows], or the factors of a low-bit codec [rows, blocks].
        norms: Euclidean norm of each row before encoding.
    """

    codec: CodecName
    codes: Shaped[Tensor, "rows columns"]
    scales: Float32[Tensor, "rows *blocks"]
    norms: Float32[Tensor, "rows"]

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, rows: slice | Tensor) -> "StoredRows":
        return StoredRows(codec=self.codec, codes=self.codes[rows], scales=self.scales[rows], norms=self.norms[rows])

    def __setitem__(self, rows: Tensor | slice, other: "StoredRows") -> None:
        self.codes[rows] = other.codes
        self.scales[rows] = other.scales
        self.norms[rows] = other.norms

    @classmethod
    def empty(cls, codec: CodecName, rows: int, dimensions: int, blocks: int) -> "StoredRows":
        """Uninitialized memory for `rows` rows."""
        return cls(
            codec=codec,
            codes=torch.empty(rows, code_columns(codec, dimensions), dtype=codec_dtype(codec)),
            scales=torch.empty(scales_shape(codec, rows, blocks)),
            norms=torch.empty(rows),
        )

    @classmethod
    def concatenated(cls, parts: Sequence["StoredRows"]) -> "StoredRows":
        """The rows of the parts, one part after the other; a single part is returned without a copy."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            codec=parts[0].codec,
            codes=torch.cat([part.codes for part in parts]),
            scales=torch.cat([part.scales for part in parts]),
            norms=torch.cat([part.norms for part in parts]),
        )

    def contiguous(self) -> "StoredRows":
        """The same rows with contiguous codes; contiguous codes are not copied."""
        return dataclasses.replace(self, codes=self.codes.contiguous())

    def to(self, device: torch.device | str) -> "StoredRows":
        """The same rows on another device."""
        codes, scales, norms = (part.to(device) for part in (self.codes, self.scales, self.norms))
        return StoredRows(codec=self.codec, codes=codes, scales=scales, norms=norms)

    def decode(self) -> Float32[Tensor, "rows dim"]:
        """The decoded coordinates, as a new tensor on the codes' device."""
        bits = quantized_bits(self.codec)
        if bits is None:
            return self.codes * self.scales[:, None]  # float32, as the scales are
        return dequantize(self.codes, self.scales, bits).flatten(1)


def encode(coordinates: Float[Tensor, "rows dim"], codec: CodecName, blocks: int = 1) -> StoredRows:
    """Encode rows of coordinates.

    float32 is lossless: codes are the values, scales are 1. For bfloat16 and float16 the scale is
    the power of two nearest to the row's root mean square (1 for a row of zeros), so codes are of
    the order of 1 and no row is too large or too small. A code's relative error is at most 2^-9 for
    bfloat16, and 2^-11 for float16 if the value is above 2^-14 of the row's root mean square; below
    that, the absolute error is at most 2^-25 of the root mean square. Low-bit codecs use
    `quantize`.

    Args:
        coordinates: φ or u, finite, on any device with float64.
        codec: One of `CODECS`.
        blocks: Number of layer blocks.

    Returns:
        Codes, scales and norms, on the same device.

    Raises:
        OptionError: The codec is unknown, or the dimensions of a block do not fill whole bytes.
    """
    check_choice("codec", codec, CODECS)
    values = coordinates.to(torch.float32)
    # In float64, no square of a float32 overflows or underflows.
    norms = torch.linalg.vector_norm(values, dim=1, dtype=torch.float64)
    bits = quantized_bits(codec)
    if bits is not None:
        codes, scales = quantize(values.reshape(len(values), blocks, -1), bits)
    elif codec == "float32":
        codes, scales = values, torch.ones(len(values), device=values.device)
    else:
        exponents = _nearest_exponents(norms / math.sqrt(values.shape[1]))
        scales = torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents)
        inverses = torch.ldexp(torch.ones_like(scales), -exponents)
        codes = (values * inverses[:, None]).to(_FLOAT_DTYPES[codec])
    return StoredRows(codec=codec, codes=codes, scales=scales, norms=norms.to(torch.float32))


def _nearest_exponents(sizes: Float[Tensor, "rows"]) -> Tensor:
    """The exponent e for which 2^e is nearest to each size, as a ratio; 0 for a size of zero."""
    mantissas, exponents = torch.frexp(sizes)
    nearest = torch.where(mantissas < math.sqrt(0.5), exponents - 1, exponents)
    return torch.where(sizes > 0, nearest.clamp(SMALLEST_EXPONENT, LARGEST_EXPONENT), 0)
