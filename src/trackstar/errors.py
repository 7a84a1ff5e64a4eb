"""The exceptions that trackstar raises for mistakes of its users and for damaged input.

    TrackstarError
    ├── OptionError              a parameter has a value that cannot be used
    ├── CorpusError              a file or record of a corpus, of queries or of results cannot be read
    ├── ModelError               a model or tokenizer cannot be loaded or used
    │   └── UnsupportedModelError    its attention and MLP matrices cannot be named
    ├── GradientError            a loss or a gradient is not finite
    ├── SecondMomentError        V cannot be read from an optimizer's state, or does not fit the model
    ├── CurvatureError           R cannot be inverted, mixed or estimated
    ├── PretrainingError         a training run cannot start, continue or be resumed
    ├── AuditError               an audit cannot be written, read or repeated
    ├── ClusterError             a cluster cannot be reached, or keeps losing its workers
    └── StoreError               an index cannot be written or read
        ├── IndexLockedError         another process is writing it
        ├── IndexMismatchError       it was made with other settings than those requested now
        ├── IncompleteIndexError     the run that makes it is not finished
        └── DamagedIndexError        a checksum, a size or a header is wrong

Every message is one line. It says what was found, what was expected and what to do, and names the
file, record, shard, example or parameter. Any other exception is a defect of trackstar.

Messages name Python parameters and functions in backticks (`k`, `codec="float16"`, `build_index`).
The command line shows its flags and commands instead.
"""

import math
import numbers
from collections.abc import Sequence

from trackstar.text import abridged, printable

LONGEST_MESSAGE = 6000
"""Most characters of a message: the longest path has 4,096 bytes; the rest is for the text."""


class TrackstarError(Exception):
    """Base of every error that a user can cause and fix.

    Args:
        message: The line. Control characters in it become spaces; a line that is too long is cut in
            the middle, so that the advice at its end remains.
    """

    def __init__(self, message: str) -> None:
        if len(message) > LONGEST_MESSAGE:
            message = f"{message[: LONGEST_MESSAGE - 500]} ... {message[-400:]}"
        super().__init__(printable(message))


class OptionError(TrackstarError, ValueError):
    """A parameter has a value that cannot be used."""


class CorpusError(TrackstarError):
    """A file or record of a corpus, of queries or of results cannot be read."""


class ModelError(TrackstarError):
    """A model or tokenizer cannot be loaded or used."""


class UnsupportedModelError(ModelError):
    """A model's attention and MLP matrices cannot be named."""


class GradientError(TrackstarError):
    """A loss or a gradient is not finite."""


class SecondMomentError(TrackstarError):
    """V cannot be read from an optimizer's state, or does not fit the model."""


class CurvatureError(TrackstarError):
    """R cannot be inverted, mixed or estimated."""


class PretrainingError(TrackstarError):
    """A training run cannot start, continue or be resumed."""


class AuditError(TrackstarError):
    """An audit cannot be written, read or repeated."""


class ClusterError(TrackstarError):
    """A cluster cannot be reached, or keeps losing its workers."""


class StoreError(TrackstarError):
    """An index cannot be written or read."""


class IndexLockedError(StoreError):
    """Another process is writing the index."""


class IndexMismatchError(StoreError):
    """The index was made with other settings than those requested now."""


class IncompleteIndexError(StoreError):
    """The run that makes the index is not finished."""


class DamagedIndexError(StoreError):
    """A checksum, a size or a header of the index is wrong."""


def check_choice(parameter: str, value: str, choices: Sequence[str]) -> None:
    """Raise if a value is not one of the choices.

    Raises:
        OptionError: The value is not one of them; the message names the parameter and the choices.
    """
    if value not in choices:
        raise OptionError(f"`{parameter}`: expected one of {', '.join(choices)}, found {value}")


def check_at_least(parameter: str, value: int | None, least: int = 1, *, bits: int = 63) -> None:
    """Raise if a number is less than `least` or has more than `bits` bits; None is not checked.

    Raises:
        OptionError: The value is out of range, or not an integer; the message names the parameter.
    """
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise OptionError(f"`{parameter}`: expected a whole number, found {value!r}")
    if value < least:
        raise OptionError(f"`{parameter}`: expected {least} or more, found {abridged(value)}")
    if value >= 2**bits:
        raise OptionError(f"`{parameter}`: expected less than 2^{bits}, found {abridged(value)}")


def check_damping(damping: float | None) -> None:
    """Raise if a damping is negative or not finite; None (a rule chooses it) is not checked.

    Raises:
        OptionError: The damping is out of range.
    """
    if damping is None:
        return
    if not isinstance(damping, numbers.Real) or not 0 <= damping < math.inf:
        raise OptionError(f"`damping`: expected 0 or more, as a fraction of R_train's mean eigenvalue, found {damping}")


def check_mixing(mixing: float | None) -> None:
    """Raise if λ is outside [0, 1]; None (the paper's rule chooses it) is not checked.

    Raises:
        OptionError: λ is out of range.
    """
    if mixing is None:
        return
    if not isinstance(mixing, numbers.Real) or not 0 <= mixing <= 1:
        raise OptionError(f"`mixing`: expected 0 (only R_train) to 1 (only R_eval), found {mixing}")
