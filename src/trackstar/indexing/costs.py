"""What the parts of indexing cost in memory, disk and operations, as functions of sizes alone.

Each function describes one part of the computation as it is written. Change it together with that part:
`benchmarks/plan.py` compares what they say with what is measured.
"""

import dataclasses

from trackstar.choices import CodecName, SecondMomentKind
from trackstar.indexing.groups import GROUP_EXAMPLES
from trackstar.model.layer_blocks import WeightMatrix
from trackstar.store import row_bytes, stores_autocorrelation

_SINGLE, _DOUBLE = 4, 8
# The share of a symmetric matrix that is computed and summed: panels of 256 of 4,096 rows.
_TRIANGLE = 17 / 32
# Operations of the rotation per number: three rounds of two products with 64 columns.
_ROTATION = 3 * 2 * 2 * 64
# Bytes of an example in a shard beside its row, tokens and strings: its numbers and five offsets.
_NUMBERS = 64
# V's estimate forms products of all pairs of a text's tokens, or whole gradients, where a row of φ needs
# projections only.
_SECOND_MOMENT_FACTOR = {"factored": 1.3, "elementwise": 1.8}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Operations:
    """Floating-point operations beside those of the model's passes.

    Attributes:
        single: In float32.
        double: In float64.
        moved: Bytes that are read or written meanwhile, where that takes as long.
    """

    single: float = 0.0
    double: float = 0.0
    moved: float = 0.0

    def __add__(self, other: "Operations") -> "Operations":
        return Operations(
            single=self.single + other.single, double=self.double + other.double, moved=self.moved + other.moved
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a part of the work needs.

    Attributes:
        held: Bytes of memory while gradients are computed.
        most: Most bytes of memory at any time, without gradients.
        stored: Bytes on disk.
        work: Its operations.
    """

    held: int = 0
    most: int = 0
    stored: int = 0
    work: Operations = dataclasses.field(default_factory=Operations)


def r_train_cost(blocks: int, side: int, examples: int) -> Cost:
    """R_train of a sample: sums of φφᵀ in float64 while its φ are computed, then their mean in float32.

    A little more than half of each symmetric matrix is computed, and added to the sums once per group of
    examples; each block's sums are freed when it has its mean. Few examples stand for R_train themselves.
    """
    if not stores_autocorrelation(examples, side):
        return Cost()
    entries = blocks * side**4
    groups = -(-examples // GROUP_EXAMPLES)
    sums = round(_DOUBLE * _TRIANGLE * entries)
    return Cost(
        held=sums,
        most=max(sums, _SINGLE * entries) + _DOUBLE * side**4,
        stored=_SINGLE * entries,
        work=Operations(single=2 * _TRIANGLE * entries * examples, moved=(groups * 9.0 + 18.0) * entries),
    )


def whitening_cost(blocks: int, side: int, examples: int) -> Cost:
    """W_train from R_train of so many examples: a Cholesky factor and its inverse in float64, block by block,
    or the eigenvectors of the Gram matrix of few examples.
    """
    entries, dim = blocks * side**4, side**2
    if not stores_autocorrelation(examples, side):
        directions = _SINGLE * blocks * examples * dim
        return Cost(
            held=directions,
            most=2 * directions + 3 * _DOUBLE * examples * dim,
            stored=directions,
            work=Operations(double=blocks * (4.0 * examples**2 * dim + 9.0 * examples**3)),
        )
    return Cost(
        held=_SINGLE * entries,
        most=2 * _SINGLE * entries + 5 * _DOUBLE * dim**2,
        stored=_SINGLE * entries,
        work=Operations(double=blocks * 4 / 3 * dim**3, moved=12.0 * entries),
    )


def rotation_cost(blocks: int, side: int, examples: int) -> Cost:
    """The rotation of W_train's square matrices before they are stored; directions of few examples have none.

    `most` comes on top of that of `whitening_cost`.
    """
    if not stores_autocorrelation(examples, side):
        return Cost()
    dim = side**2
    return Cost(most=2 * _SINGLE * dim**2, work=Operations(single=float(blocks * dim * _ROTATION * dim)))


def whitened_rows_cost(blocks: int, side: int, examples: int, sample: int) -> Cost:
    """u = W_train φ of examples, a group at a time: φ of the group is held, and copied in two layouts.

    Args:
        blocks: Number of layer blocks.
        side: √d.
        examples: Number of examples.
        sample: Number of examples that R_train is the mean of.
    """
    dim = side**2
    rows = min(GROUP_EXAMPLES, examples) * blocks * dim * _SINGLE
    if stores_autocorrelation(sample, side):
        work = Operations(single=2.0 * blocks * dim**2 * examples)
    else:
        products = 4.0 * blocks * sample * dim * examples
        work = Operations(single=float(_ROTATION * blocks * dim * examples), double=products)
    return Cost(held=rows, most=4 * rows, work=work)


def rows_bytes(codec: CodecName, blocks: int, side: int, examples: int) -> int:
    """Bytes of the codes of some examples, with scales and norms."""
    return examples * row_bytes(codec, blocks * side**2, blocks)


def example_bytes(examples: int, tokens: int, string_bytes: int) -> int:
    """Bytes of examples in a shard beside their rows: tokens and targets, strings, and numbers."""
    return examples * _NUMBERS + tokens * 5 + string_bytes


def second_moment_bytes(matrices: tuple[WeightMatrix, ...], kind: SecondMomentKind) -> int:
    """Bytes of V: a number for every row and column of a matrix, or for every weight."""
    factored = kind == "factored"
    return _SINGLE * sum(m.rows + m.columns if factored else m.rows * m.columns for m in matrices)


def second_moment_factor(kind: SecondMomentKind) -> float:
    """Time of V's estimate, as a multiple of that of φ of the same tokens."""
    return _SECOND_MOMENT_FACTOR[kind]


def second_moment_memory(matrices: tuple[WeightMatrix, ...], kind: SecondMomentKind) -> int:
    """Bytes of memory that V's estimate needs beside activations: sums, and one matrix's gradient squared."""
    sums = second_moment_bytes(matrices, kind) * (2 if kind == "factored" else 1)
    return sums + 2 * _SINGLE * max((m.rows * m.columns for m in matrices), default=0)


def projection_bytes(matrices: tuple[WeightMatrix, ...], side: int) -> int:
    """Bytes of the projections P₀ and P₁ of all matrices."""
    return _SINGLE * side * sum(m.rows + m.columns for m in matrices)


def activation_bytes(matrices: tuple[WeightMatrix, ...], tokens: int, itemsize: int) -> int:
    """Least bytes of memory that a batch's graph takes: inputs and outputs of every matrix."""
    return tokens * itemsize * sum(m.rows + m.columns for m in matrices)


def logits_bytes(tokens: int, vocabulary: int, chunk: int) -> int:
    """Bytes of the logits of a chunk of target positions, and of the softmax of them."""
    return 2 * _SINGLE * min(max(16, chunk // (_SINGLE * vocabulary)), tokens) * vocabulary
