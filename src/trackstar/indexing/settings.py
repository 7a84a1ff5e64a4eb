"""The settings of a new index, checked on creation.

Nothing heavy is imported here, so that the command line reads its defaults and choices from
`IndexSettings`.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trackstar.choices import (
    CODECS,
    COORDINATES,
    LOW_BIT_CODECS,
    OUTPUTS,
    PRESETS,
    PROJECTIONS,
    SECOND_MOMENT_KINDS,
    CodecName,
    Coordinates,
    Output,
    Preset,
    ProjectionKind,
    SecondMomentKind,
)
from trackstar.errors import OptionError, check_at_least, check_choice, check_damping

if TYPE_CHECKING:
    from trackstar.gradients.second_moment import SecondMoment

STREAM_WHITENING_EXAMPLES = 4096
"""Default of `whitening_examples` for a streamed corpus, whose sample is computed twice."""


PAPER_SIDE = 64
"""√d in the paper, whose 16 layer blocks have 65,536 dimensions together."""

_PAPER: dict[str, Any] = {
    "side": PAPER_SIDE, "codec": "float32", "coordinates": "projected", "second_moment_kind": "factored",
    "output": "loss", "projection": "two-sided",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class IndexSettings:
    """The settings of a new index. The fields and their defaults are the keywords of
    `build_index`.

    Attributes:
        window_tokens: Longest window, in tokens; longer documents are split. None is the model's
            context or `batch_tokens`, whichever is shorter.
        overlap: Tokens that a window repeats from the one before, as context only.
        truncate: Whether a longer document is cut to one window, as training with truncation does,
            and not split.
        pack: Tokens of a row, for what was trained on packed sequences: the documents' tokens, each
            document's followed by the end-of-text token, are cut into rows of this length, which are
            the examples. None leaves documents as they are.
        second_moment: V: `auto` reads the optimizer's state beside the model's weights and
            estimates V if there is none; `estimate`, `none`, a file or folder of optimizer state,
            or a `SecondMoment`.
        second_moment_kind: `factored` folds into the projections at no cost; `elementwise` is exact
            and slower.
        second_moment_examples: Number of examples that V is estimated from.
        preset: `paper` is the setting of the paper to the letter: side 64, rows in float32 and projected,
            and R_train of every example. None follows the other settings.
        side: √d, rows and columns of a block of φ (64 in the paper). None is chosen by the model's and the
            corpus's size and the machine's memory; see `defaults.py`.
        seed: Seed of the projections and of all samples.
        output: The function that is differentiated: `loss`, or for comparisons TRAK's `margin` or
            the `logit`.
        projection: `two-sided` (Eq. 4), or for comparisons `one-sided`: one dense matrix for
            flattened gradients, for small models only.
        codec: How a row is stored. None is chosen by the size of the rows; see `defaults.py`.
        coordinates: `projected` stores φ; `whitened` stores u = W_train φ, which low-bit codecs
            need. None is `projected` for a given codec of 16 bits or more; see `defaults.py` for others.
        whitening_examples: Records that R_train is computed from if coordinates are whitened, drawn
            with `seed` in a first pass, whose gradients are not computed again. A corpus of no more
            records is taken whole.
        damping: If coordinates are whitened, the ridge added to R_train, as a fraction of its mean
            eigenvalue per block; None is chosen by `shrinkage_damping`. Projected rows are damped
            when they are queried.
        shard_examples: Examples per shard; None makes shards of about 64 MiB, at most 4,096
            examples.
        batch_tokens: Most tokens per batch, padding included; peak memory follows it.

    Raises:
        OptionError: A setting is out of range, or two do not fit together; the message names them.
    """

    window_tokens: int | None = None
    overlap: int = 1
    truncate: bool = False
    pack: int | None = None
    second_moment: "str | Path | SecondMoment" = "auto"
    second_moment_kind: SecondMomentKind = "factored"
    second_moment_examples: int = 256
    preset: Preset | None = None
    side: int | None = None
    seed: int = 0
    output: Output = "loss"
    projection: ProjectionKind = "two-sided"
    codec: CodecName | None = None
    coordinates: Coordinates | None = None
    whitening_examples: int = 16_384
    damping: float | None = None
    shard_examples: int | None = None
    batch_tokens: int = 2048

    def __post_init__(self) -> None:
        check_choice("second_moment_kind", self.second_moment_kind, SECOND_MOMENT_KINDS)
        check_choice("output", self.output, OUTPUTS)
        check_choice("projection", self.projection, PROJECTIONS)
        if self.codec is not None:
            check_choice("codec", self.codec, CODECS)
        if self.preset is not None:
            check_choice("preset", self.preset, PRESETS)
            self._follow_paper()
        if self.coordinates is not None:
            check_choice("coordinates", self.coordinates, COORDINATES)
        for name in (
            "window_tokens", "overlap", "side", "second_moment_examples", "whitening_examples", "shard_examples",
            "batch_tokens",
        ):  # fmt: skip
            check_at_least(name, getattr(self, name))
        check_at_least("window_tokens", self.window_tokens, 2)
        check_at_least("pack", self.pack, 2)
        if self.pack is not None and self.truncate:
            raise OptionError(
                f"`truncate`: expected False with `pack`, whose rows have one length already, found {self.truncate}; "
                "leave one of them out"
            )
        check_at_least("seed", self.seed, 0, bits=64)
        check_damping(self.damping)
        if self.codec in LOW_BIT_CODECS:
            if self.coordinates == "projected":
                raise OptionError(
                    f'`coordinates`: expected whitened for `codec="{self.codec}"`, whose codes are too coarse to '
                    "compute R_train from, found projected; leave `coordinates` out, or choose `codec` float32, "
                    "bfloat16 or float16"
                )
            if self.side is not None and self.side % 8:
                raise OptionError(f'`side`: expected a multiple of 8 for `codec="{self.codec}"`, found {self.side}')
        if self.damping is not None and not self.whitened:
            raise OptionError(
                f"`damping`: applies to whitened coordinates, found {self.damping} with projected ones, which are "
                "damped when they are queried; pass `damping` to `answer_queries`"
            )

    def _follow_paper(self) -> None:
        """Take the paper's values where none is given, and refuse others."""
        for name, value in _PAPER.items():
            given = getattr(self, name)
            if given is None:
                object.__setattr__(self, name, value)
            elif given != value:
                raise OptionError(
                    f'`{name}`: expected {value} with `preset="paper"`, found {given}; leave one of them out'
                )

    @property
    def whitened(self) -> bool:
        """Whether rows are stored in whitened coordinates."""
        projected = self.codec is not None and self.codec not in LOW_BIT_CODECS
        return (self.coordinates or ("projected" if projected else "whitened")) == "whitened"

    def chosen(self, *, side: int, codec: CodecName, coordinates: Coordinates | None) -> "ChosenSettings":
        """The same settings with what was left to choose.

        Args:
            side: The side.
            codec: The codec.
            coordinates: The coordinates; None is what the settings say without them.
        """
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields |= {"side": side, "codec": codec}
        fields["coordinates"] = coordinates or ("whitened" if self.whitened else "projected")
        return ChosenSettings(**fields)

    @classmethod
    def default(cls, name: str) -> Any:
        """The default of a setting, for interfaces that show it."""
        (found,) = (field.default for field in dataclasses.fields(cls) if field.name == name)
        return found


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChosenSettings(IndexSettings):
    """The settings of a new index with nothing left to choose."""

    side: int = PAPER_SIDE
    codec: CodecName = "1-bit"
