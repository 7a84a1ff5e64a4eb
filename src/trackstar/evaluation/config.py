"""Settings of an evaluation: a TOML file, read strictly so that a misspelt key is an error."""

import dataclasses
import math
import os
import tomllib
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from trackstar.choices import CODECS, DUPLICATE_IDS, LOW_BIT_CODECS, CodecName, DeviceMap, DuplicateIds
from trackstar.corpus.local_files import check_not_special
from trackstar.errors import OptionError, check_at_least, check_choice, check_damping
from trackstar.indexing.settings import PAPER_SIDE, IndexSettings
from trackstar.model.devices import checked_device_map
from trackstar.text import abridged, one_line

METHODS = (
    "gold",
    "random",
    "BM25",
    "embeddings",
    "experiment 1",
    "experiment 2",
    "experiment 3",
    "experiment 4",
    "experiment 5",
    "TrackStar",
    "TrackStar, margin",
    "TrackStar, logit",
    "TrackStar, one-sided",
    "TRAK",
    "TRAK, R over tokens",
)
"""Names of all methods, as in tables."""

WITH_SECOND_MOMENT = tuple(m for m in METHODS if m.startswith("TrackStar") or m in ("experiment 4", "experiment 5"))
"""Methods that divide gradients by √V."""

LEAST_POOL = 10
"""Smallest value of `pool_sizes`."""

Half = Literal["all", "development", "report"]
HALVES: tuple[Half, ...] = get_args(Half)

TailPatchPath = Literal["fast", "exact"]

PROJECTED_CODECS = tuple(codec for codec in CODECS if codec not in LOW_BIT_CODECS)
"""Codecs of projected coordinates, which methods without R need."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TailPatchConfig:
    """Settings of tail-patch; the table [tail_patch].

    Attributes:
        methods: Methods whose proponents are measured; empty takes all of the report.
        queries: Number of queries to measure, the first in an order drawn by id; 0 takes all.
        top_k: Numbers of proponents that effects are averaged over; the largest is the number that
            is measured.
        learning_rate: Step size for a model without optimizer state, relative to each matrix's root
            mean square; empty means 0.01. The first value is used in all tables; another table
            compares it with the others.
        path: `fast` (low-rank adapters, many pairs at a time) or `exact` (the optimizer's own
            step).
    """

    methods: tuple[str, ...] = ()
    queries: int = 0
    top_k: tuple[int, ...] = (1, 3, 5, 10)
    learning_rate: tuple[float, ...] = ()
    path: TailPatchPath = "fast"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    """Settings of a report; the keys of the TOML file.

    Attributes:
        model: Model folder, `.gguf` file or hub name. A checkpoint of `pretrain` comes with its
            optimizer state.
        corpus: The candidates.
        facts: The facts to trace; see `read_facts`.
        text_field: Field of the corpus that holds the text.
        id_field: Field that holds an example's id, as the facts' gold examples name it; None
            detects it.
        limit: Most candidates; None takes all. A gold example that is then missing is an error.
        duplicate_ids: What is done with a second record of a name; see `open_corpus`.
        queries: Most facts, balanced over relations; None takes all.
        half: Half of the facts that is evaluated: choose settings on `development`, report figures
            on `report`.
        methods: Methods, in the order of the tables.
        templates: Numbers of the prompts (Table A.5); all other tables use the first.
        embedding_model: Folder of a sentence-embedding model, for the method `embeddings`.
        entailment_model: Folder or hub name of the entailment model of the open-set evaluation;
            without one, gold examples are the examples that entail a fact.
        strict: Whether only gold examples that state their fact plainly count as correct.
        top_k: Number of proponents per query.
        side: Rows and columns of a block of φ. The first is that of the tables; several are
            compared as projection dimensions (Figure 2). The method with one-sided projections uses
            the smallest.
        checkpoints: Earlier checkpoints of the model's training, whose TrackStar rankings are
            compared (Figure 2).
        pool_sizes: Sizes of smaller pools, in which every query is ranked as well; see
            `trackstar.evaluation.pool_sizes`. A size that the number of candidates does not exceed
            stands for all candidates.
        second_moment: Source of V; see `build_index`.
        damping: Ridge added to R_train, as a fraction of its mean eigenvalue per block; None is
            chosen by `shrinkage_damping`.
        codec: Codec of φ.
        batch_tokens: Most tokens per batch.
        device: Device that gradients are computed on; see `load_model`.
        device_map: Spreads the model over several GPUs; see `load_model`.
        seed: Seed of projections and of all samples.
        tail_patch: Settings of tail-patch; None leaves it out.

    Raises:
        OptionError: A value is out of range, or two values do not fit together; the message names
            the keys.
    """

    model: str
    corpus: str
    facts: str
    text_field: str = "text"
    id_field: str | None = None
    limit: int | None = None
    duplicate_ids: DuplicateIds = "refuse"
    queries: int | None = None
    half: Half = "all"
    methods: tuple[str, ...] = ("gold", "random", "BM25", "experiment 1", "experiment 2", "TrackStar")
    templates: tuple[int, ...] = (0,)
    embedding_model: str | None = None
    entailment_model: str | None = None
    strict: bool = False
    top_k: int = 10
    side: tuple[int, ...] = (PAPER_SIDE,)
    checkpoints: tuple[str, ...] = ()
    pool_sizes: tuple[int, ...] = ()
    second_moment: str = IndexSettings.default("second_moment")
    damping: float | None = IndexSettings.default("damping")
    codec: CodecName = "float16"
    batch_tokens: int = IndexSettings.default("batch_tokens")
    device: str = "auto"
    device_map: DeviceMap | None = None
    seed: int = IndexSettings.default("seed")
    tail_patch: TailPatchConfig | None = None

    def __post_init__(self) -> None:
        _check_names("methods", self.methods, METHODS)
        check_choice("half", self.half, HALVES)
        check_choice("duplicate_ids", self.duplicate_ids, DUPLICATE_IDS)
        check_choice("codec", self.codec, PROJECTED_CODECS)
        checked_device_map(self.device_map, self.device)
        for key in ("limit", "queries", "top_k", "batch_tokens"):
            check_at_least(key, getattr(self, key))
        for key, least in (("side", 1), ("templates", 0)):
            values = getattr(self, key)
            if min(values, default=least) < least:
                raise OptionError(f"`{key}`: expected numbers of {least} or more, found {abridged(list(values))}")
        if len(set(self.pool_sizes)) < len(self.pool_sizes) or min(self.pool_sizes, default=LEAST_POOL) < LEAST_POOL:
            raise OptionError(
                f"`pool_sizes`: expected numbers of {LEAST_POOL} or more, each once, found "
                f"{abridged(list(self.pool_sizes))}"
            )
        check_damping(self.damping)
        if self.second_moment == "none" and any(method in self.methods for method in WITH_SECOND_MOMENT):
            raise OptionError(
                "`second_moment`: expected a source of V for the methods that need V, found none; leave it out "
                "(experiments 1 to 3 and TRAK use no V in any case)"
            )
        for key in ("methods", "templates", "side", "checkpoints"):
            values = getattr(self, key)
            if (not values and key != "checkpoints") or len(set(values)) < len(values):
                raise OptionError(f"`{key}`: expected one or more values, each once, found {abridged(list(values))}")
        if (len(self.side) > 1 or self.checkpoints) and "TrackStar" not in self.methods:
            raise OptionError(
                "`methods`: expected TrackStar, by which several values of `side` or `checkpoints` are compared; add it"
            )
        if "embeddings" in self.methods and self.embedding_model is None:
            raise OptionError("`embedding_model`: the method embeddings needs a model folder, found none; add one")
        if self.tail_patch is not None:
            _check_tail_patch(self.tail_patch, self)


def read_config(path: str | os.PathLike[str]) -> EvaluationConfig:
    """Read the settings of a report; paths in them are relative to the file's folder.

    Raises:
        OptionError: The file cannot be read, or a key or value is not one of `EvaluationConfig`;
            the message names the file and the key.
    """
    file = Path(path)
    check_not_special(file, OptionError)
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"{file}: cannot be read ({error.strerror}); expected a TOML file of settings") from None
    except (ValueError, RecursionError) as error:  # not TOML, not UTF-8, or a number of thousands of digits
        raise OptionError(f"{file}: is not TOML ({one_line(error)}); expected a TOML file of settings") from None
    table = content.pop("tail_patch", None)
    try:
        if table is not None:
            content["tail_patch"] = TailPatchConfig(**_settings_of(TailPatchConfig, table, "tail_patch."))
        settings = _settings_of(EvaluationConfig, content, "")
        for key in ("corpus", "facts", "embedding_model"):
            if isinstance(settings.get(key), str):
                settings[key] = str(file.parent / _expanded(key, settings[key]))
        if settings.get("second_moment", "auto") not in ("auto", "estimate", "none"):
            settings["second_moment"] = str(file.parent / _expanded("second_moment", settings["second_moment"]))
        for key in ("model", "entailment_model"):
            if isinstance(settings.get(key), str):
                settings[key] = _resolved(key, file.parent, settings[key])
        if "checkpoints" in settings:
            settings["checkpoints"] = tuple(
                _resolved("checkpoints", file.parent, name) for name in settings["checkpoints"]
            )
        return EvaluationConfig(**settings)
    except OptionError as error:
        raise OptionError(f"{file}: {error}") from None


def _resolved(key: str, folder: Path, name: str) -> str:
    """A path relative to the settings' folder if it exists there; else the name itself, which may
    be a hub's.

    Raises:
        OptionError: The name can only be a path, and the path does not exist.
    """
    candidate = folder / _expanded(key, name)
    try:
        if candidate.exists():
            return str(candidate)
        first = folder / Path(name).parts[0]
        if name.startswith((".", "~", "/")) or name.endswith(".gguf") or name.count("/") > 1 or first.exists():
            raise OptionError(
                f"`{key}`: expected a model folder, a .gguf file or a hub name, found no file {candidate}"
            )
    except OSError as error:
        raise OptionError(
            f"`{key}`: expected a model folder, a .gguf file or a hub name, found {abridged(name)} ({error.strerror})"
        ) from None
    return name


def _expanded(key: str, name: str) -> Path:
    """The path with `~` expanded.

    Raises:
        OptionError: The home folder is unknown.
    """
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise OptionError(f"`{key}`: expected a path, found {abridged(name)} ({error}); write it without ~") from None


def _settings_of(kind: Any, table: object, prefix: str) -> dict[str, Any]:
    """Values of a TOML table, checked against the fields of a dataclass and their types.

    Raises:
        OptionError: A key is unknown or missing, or a value has the wrong type; the message names
            the key.
    """
    if not isinstance(table, dict):
        raise OptionError(f"`{prefix.rstrip('.')}`: expected a table, found {type(table).__name__}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(set(table) - set(fields))
    if unknown:
        raise OptionError(f"`{prefix}{one_line(unknown[0], 80)}`: no such key; expected one of {', '.join(fields)}")
    missing = [name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in table]
    if missing:
        raise OptionError(f"`{prefix}{missing[0]}`: expected a value, found none; add the key")
    return {name: _value(f"{prefix}{name}", fields[name].type, value) for name, value in table.items()}


_ITEM_TYPES: dict[Any, Any] = {tuple[str, ...]: str, tuple[int, ...]: int, tuple[float, ...]: float}
_TOML_TYPES: dict[Any, tuple[type, ...]] = {
    str: (str,), str | None: (str,), bool: (bool,), int: (int,), int | None: (int,),
    float: (float, int), float | None: (float, int),
}  # fmt: skip


def _value(key: str, kind: Any, value: Any) -> Any:
    """A value of a TOML table, checked against a field's type; a single value is a list of one."""
    if isinstance(value, TailPatchConfig):
        return value
    if kind in _ITEM_TYPES:
        values = value if isinstance(value, list) else [value]
        return tuple(_value(key, _ITEM_TYPES[kind], item) for item in values)
    choices = next((get_args(one) for one in (kind, *get_args(kind)) if get_origin(one) is Literal), None)
    expected = _TOML_TYPES[kind if choices is None else str]
    if not isinstance(value, expected) or (isinstance(value, bool) and bool not in expected):
        names = " or ".join(one.__name__ for one in expected)
        raise OptionError(f"`{key}`: expected {names}, found {abridged(value)}")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise OptionError(f"`{key}`: expected a number of at most 64 bits, found {abridged(value)}")
    if choices is not None:
        check_choice(key, str(value), choices)
    return float(value) if float in expected else value


def _check_names(key: str, names: tuple[str, ...], choices: tuple[str, ...]) -> None:
    """Raise if a name is not one of the choices; names are quoted, for some contain commas."""
    for name in names:
        if name not in choices:
            raise OptionError(f"`{key}`: expected one of {', '.join(map(repr, choices))}, found {abridged(name)}")


def _check_tail_patch(config: TailPatchConfig, report: EvaluationConfig) -> None:
    _check_names("tail_patch.methods", config.methods, report.methods)
    check_choice("tail_patch.path", config.path, get_args(TailPatchPath))
    if not config.top_k or min(config.top_k) < 1 or max(config.top_k) > report.top_k:
        raise OptionError(
            f"`tail_patch.top_k`: expected numbers from 1 to {report.top_k} (`top_k`), found "
            f"{abridged(list(config.top_k))}"
        )
    check_at_least("tail_patch.queries", config.queries, 0)
    rates = config.learning_rate
    if len(set(rates)) < len(rates) or not all(math.isfinite(rate) and rate > 0 for rate in rates):
        raise OptionError(
            f"`tail_patch.learning_rate`: expected finite numbers above 0, each once, found {abridged(list(rates))}"
        )
