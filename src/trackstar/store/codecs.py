"""How rows of coordinates become the numbers that a shard stores, and back.

float32, bfloat16, float16: a row is stored as codes c and one scale s, a power of two: row ≈ c·s. Multiplying by a
power of two is exact, so the only rounding is that of the codec's own number format; and a row of any magnitude fits
into it.

int8, 4-bit, 2-bit, 1-bit: whole numbers, and a factor for each layer block that makes inner products unbiased; see
`quantization.py`. They are made for whitened coordinates.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import get_args

import torch
from jaxtyping import Float, Float32, Shaped
from torch import Tensor

from trackstar.choices import CodecName
from trackstar.errors import OptionError
from trackstar.store.quantization import Bits, dequantize, quantize

CODECS: tuple[CodecName, ...] = get_args(CodecName)
_FLOAT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_BITS: dict[str, Bits] = {"int8": 8, "4-bit": 4, "2-bit": 2, "1-bit": 1}

# The scale and its inverse are then both normal float32 numbers.
SMALLEST_EXPONENT, LARGEST_EXPONENT = -126, 126


def check_codec(codec: str) -> None:
    """See that there is a codec of this name.

    Raises:
        OptionError: There is none.
    """
    if codec not in CODECS:
        raise OptionError(f"--codec {codec}: expected one of {', '.join(CODECS)}")


def check_quantizable(codec: CodecName, side: int) -> None:
    """See that a layer block of side² dimensions fills whole words of a codec's codes.

    Raises:
        OptionError: It does not.
    """
    if codec in _BITS and side % 8:
        raise OptionError(f"--side {side}: expected a multiple of 8 for --codec {codec}")


def quantized_bits(codec: CodecName) -> Bits | None:
    """Bits a dimension of a codec with factors; None for a floating-point one."""
    return _BITS.get(codec)


def codec_bits(codec: CodecName) -> int:
    """Bits a dimension."""
    return _BITS[codec] if codec in _BITS else _FLOAT_DTYPES[codec].itemsize * 8


def codec_dtype(codec: CodecName) -> torch.dtype:
    """The dtype of a codec's codes."""
    return _FLOAT_DTYPES.get(codec, torch.uint8)


def code_columns(codec: CodecName, dimensions: int) -> int:
    """Number of codes that a row is stored in: dimensions, or bytes."""
    return dimensions * _BITS[codec] // 8 if codec in _BITS else dimensions


def scales_shape(codec: CodecName, rows: int, blocks: int) -> tuple[int, ...]:
    """Shape of the scales of so many rows: one a row, or one a row and layer block."""
    return (rows, blocks) if codec in _BITS else (rows,)


def row_bytes(codec: CodecName, dimensions: int, blocks: int) -> int:
    """Bytes that a row takes in a store: codes, scales and norm. Its tokens and text are beside it."""
    scales = blocks if codec in _BITS else 1
    return code_columns(codec, dimensions) * codec_dtype(codec).itemsize + 4 * scales + 4


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredRows:
    """Rows of coordinates as a shard keeps them.

    Attributes:
        codec: The codec.
        codes: Numbers in the codec's own format, or packed codes [rows, bytes].
        scales: A row's power of two [rows], or the factors of a quantizing codec [rows, blocks].
        norms: Euclidean norm of each row before it was coded.
    """

    codec: CodecName
    codes: Shaped[Tensor, "rows columns"]
    scales: Float32[Tensor, "rows *blocks"]
    norms: Float32[Tensor, "rows"]

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, rows: slice | Tensor) -> "StoredRows":
        return StoredRows(codec=self.codec, codes=self.codes[rows], scales=self.scales[rows], norms=self.norms[rows])

    def __setitem__(self, rows: Tensor, other: "StoredRows") -> None:
        self.codes[rows] = other.codes
        self.scales[rows] = other.scales
        self.norms[rows] = other.norms

    @classmethod
    def empty(cls, codec: CodecName, rows: int, dimensions: int, blocks: int) -> "StoredRows":
        """Memory for so many rows."""
        return cls(
            codec=codec,
            codes=torch.empty(rows, code_columns(codec, dimensions), dtype=codec_dtype(codec)),
            scales=torch.empty(scales_shape(codec, rows, blocks)),
            norms=torch.empty(rows),
        )

    @classmethod
    def joined(cls, parts: Sequence["StoredRows"]) -> "StoredRows":
        """Rows of one part after the other; a single part is given back as it is."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            codec=parts[0].codec,
            codes=torch.cat([part.codes for part in parts]),
            scales=torch.cat([part.scales for part in parts]),
            norms=torch.cat([part.norms for part in parts]),
        )

    def contiguous(self) -> "StoredRows":
        """The same with codes that lie one after the other; those that do are not copied."""
        return dataclasses.replace(self, codes=self.codes.contiguous())

    def to(self, device: torch.device | str) -> "StoredRows":
        """The same on another device."""
        moved = (part.to(device) for part in (self.codes, self.scales, self.norms))
        codes, scales, norms = moved
        return StoredRows(codec=self.codec, codes=codes, scales=scales, norms=norms)

    def decode(self) -> Float32[Tensor, "rows dim"]:
        """The coordinates that inner products are taken with, always a new tensor on the codes' device."""
        bits = quantized_bits(self.codec)
        if bits is None:
            return self.codes.to(torch.float32) * self.scales[:, None]
        return dequantize(self.codes, self.scales, bits).flatten(1)


def encode(coordinates: Float[Tensor, "rows dim"], codec: CodecName, blocks: int = 1) -> StoredRows:
    """Rows of coordinates as they are stored.

    float32 is lossless: codes are the values, scales are 1. For bfloat16 and float16 the scale is the power of two
    nearest to the row's root mean square (1 where the row is zero), so that codes are of the order of 1: no row is too
    large or too small, and a code's relative error is at most 2^-9 (bfloat16) or 2^-11 (float16, for values above
    2^-14 of the row's root mean square; its absolute error below that is at most 2^-25 of it). The others are
    `quantization.quantize`.

    Args:
        coordinates: φ or u, finite, on any device.
        codec: One of `CODECS`.
        blocks: Number of layer blocks.

    Returns:
        Codes, scales and norms, on the same device.

    Raises:
        OptionError: There is no codec of that name, or the dimensions of a block do not fill whole bytes.
    """
    check_codec(codec)
    values = coordinates.to(torch.float32)
    # In float64 the square of no float32 overflows or vanishes.
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
    """The e for which 2^e is nearest to each size, as a ratio; 0 where it is zero."""
    mantissas, exponents = torch.frexp(sizes)
    nearest = torch.where(mantissas < math.sqrt(0.5), exponents - 1, exponents)
    return torch.where(sizes > 0, nearest.clamp(SMALLEST_EXPONENT, LARGEST_EXPONENT), 0)
