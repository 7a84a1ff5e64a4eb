"""The exceptions that trackstar raises for its users' mistakes and for damaged input.

    TrackstarError
    ├── OptionError              an option or argument has a value that cannot be used
    ├── CorpusError              a file or record of a corpus, of queries or of results cannot be read
    ├── ModelError               a model or tokenizer cannot be loaded or used
    │   └── UnsupportedModelError    its attention and MLP matrices cannot be named
    ├── GradientError            a loss or a gradient is not finite
    ├── SecondMomentError        V cannot be read from an optimizer's state, or does not fit the model
    ├── CurvatureError           R cannot be inverted, mixed or estimated
    ├── PretrainingError         a training run cannot start, go on or be resumed
    ├── AuditError               an audit cannot be written, read or repeated
    ├── ClusterError             a cluster cannot be reached, or loses its workers again and again
    └── StoreError               an index cannot be written or read
        ├── IndexLockedError         another process is writing it
        ├── IndexMismatchError       it was made with something else than what was asked for now
        ├── IncompleteIndexError     its making was interrupted
        └── DamagedIndexError        a checksum, a size or a header is wrong

Every message is one line: what was found, what was expected, what to do; it names the file, record, shard,
example or option. Anything else that escapes is a defect of trackstar.
"""

from trackstar.text import printable

LONGEST_MESSAGE = 6000
"""Most characters of a message: a path, the longest of which has 4,096 bytes, and what is said of it."""


class TrackstarError(Exception):
    """Base of every error that a user can cause and mend.

    Args:
        message: The line. What it quotes of a file stays on it, whatever that is, and leaves room for what to do.
    """

    def __init__(self, message: str) -> None:
        if len(message) > LONGEST_MESSAGE:
            message = f"{message[: LONGEST_MESSAGE - 500]} ... {message[-400:]}"
        super().__init__(printable(message))


class OptionError(TrackstarError):
    """An option or argument has a value that cannot be used."""


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
    """A training run cannot start, go on or be resumed."""


class AuditError(TrackstarError):
    """An audit cannot be written, read or repeated."""


class ClusterError(TrackstarError):
    """A cluster cannot be reached, or loses its workers again and again."""


class StoreError(TrackstarError):
    """An index cannot be written or read."""


class IndexLockedError(StoreError):
    """Another process is writing the index."""


class IndexMismatchError(StoreError):
    """The index was made with something else than what was asked for now."""


class IncompleteIndexError(StoreError):
    """The index's making was interrupted."""


class DamagedIndexError(StoreError):
    """A checksum, a size or a header of the index is wrong."""
