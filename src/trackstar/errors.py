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
    └── StoreError               an index cannot be written or read
        ├── IndexLockedError         another process is writing it
        ├── IndexMismatchError       it was made with something else than what was asked for now
        ├── IncompleteIndexError     its making was interrupted
        └── DamagedIndexError        a checksum, a size or a header is wrong

Every message is one line: what was found, what was expected, what to do; it names the file, record, shard,
example or option. Anything else that escapes is a defect of trackstar.
"""


class TrackstarError(Exception):
    """Base of every error that a user can cause and mend."""


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
