"""What one report is made of: a TOML file, read strictly, so that a misspelt key is an error and not a default."""

import dataclasses
import math
import os
import tomllib
from pathlib import Path
from typing import Any

from trackstar.corpus.data_files import one_line
from trackstar.errors import OptionError
from trackstar.text import abridged

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
"""Every method by its name in tables."""

WITH_SECOND_MOMENT = tuple(m for m in METHODS if m.startswith("TrackStar") or m in ("experiment 4", "experiment 5"))
"""Those that divide gradients by √V."""

HALVES = ("all", "development", "report")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TailPatchConfig:
    """How tail-patch is measured; the table [tail_patch].

    Attributes:
        methods: The methods whose proponents are trained on; empty is all of the report's.
        queries: How many of the report's queries, the first in an order drawn by name; 0 is all.
        top_k: Over how many proponents effects are averaged; the largest decides how many are measured.
        learning_rate: Of the step of a model without optimizer state, relative to each matrix's root mean square; none
            is 0.01. Of several, the first is that of all tables, the others are compared with it in one.
        path: `fast` (low-rank adapters, many pairs at once) or `exact` (the optimizer's own step).
    """

    methods: tuple[str, ...] = ()
    queries: int = 0
    top_k: tuple[int, ...] = (1, 3, 5, 10)
    learning_rate: tuple[float, ...] = ()
    path: str = "fast"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    """A report's settings.

    Attributes:
        model: Model folder, `.gguf` file or hub name; a checkpoint of `trackstar pretrain` brings its optimizer state.
        corpus: The candidates.
        facts: The facts whose training examples are looked for; see `read_facts`.
        text_field: The corpus's field that holds the text.
        id_field: The field that names an example, as the facts' gold examples do; None finds it.
        limit: Most candidates; None for all. Facts whose gold examples are then missing are an error.
        queries: Most facts, balanced over relations as they come; None for all.
        half: Which half of the facts is reported on: settings are chosen on `development`, figures taken on `report`.
        methods: Which methods, in the order of the tables.
        templates: Which prompts (Table A.5); the first is the one that all other tables are of.
        embedding_model: Folder of a sentence-embedding model, for the method `embeddings`.
        entailment_model: Folder or hub name of an entailment model that judges proponents (open-set evaluation); None
            has gold examples stand for those that entail a fact.
        strict: Whether only gold examples that state their fact plainly are right.
        top_k: How many proponents are kept a query.
        side: Rows and columns of a block of φ; several are Figure 2's projection dimensions, the first is the tables'.
            The method with one-sided projections has the smallest.
        checkpoints: Earlier checkpoints of the model's training, whose TrackStar rankings are compared (Figure 2).
        second_moment: Where V comes from; see `build_index`.
        damping: Of R; None is chosen by shrinkage.
        codec: What φ is stored as.
        batch_tokens: Most tokens of a batch.
        device: Where gradients are computed.
        seed: Of projections and of everything drawn.
        tail_patch: How tail-patch is measured; None leaves it out.
    """

    model: str
    corpus: str
    facts: str
    text_field: str = "text"
    id_field: str | None = None
    limit: int | None = None
    queries: int | None = None
    half: str = "all"
    methods: tuple[str, ...] = ("gold", "random", "BM25", "experiment 1", "experiment 2", "TrackStar")
    templates: tuple[int, ...] = (0,)
    embedding_model: str | None = None
    entailment_model: str | None = None
    strict: bool = False
    top_k: int = 10
    side: tuple[int, ...] = (64,)
    checkpoints: tuple[str, ...] = ()
    second_moment: str = "auto"
    damping: float | None = None
    codec: str = "float16"
    batch_tokens: int = 2048
    device: str = "cpu"
    seed: int = 0
    tail_patch: TailPatchConfig | None = None

    def __post_init__(self) -> None:
        _choices("methods", self.methods, METHODS)
        _choices("half", (self.half,), HALVES)
        _choices("codec", (self.codec,), ("float32", "bfloat16", "float16"))
        for name in ("limit", "queries", "top_k", "batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"{name} is {value}; expected 1 or more")
        for name, least in (("side", 1), ("templates", 0)):
            if min(getattr(self, name), default=least) < least:
                raise OptionError(f"{name} is {abridged(list(getattr(self, name)))}; expected numbers from {least} on")
        if self.damping is not None and not (math.isfinite(self.damping) and self.damping >= 0):
            raise OptionError(f"damping is {self.damping}; expected a finite number, at least 0")
        if self.second_moment == "none" and any(m in self.methods for m in WITH_SECOND_MOMENT):
            raise OptionError(
                "second_moment is 'none', but there are methods with V; leave it out (experiments 1 to 3 and TRAK take "
                "none in any case)"
            )
        for name in ("methods", "templates", "side", "checkpoints"):
            values = getattr(self, name)
            if (not values and name != "checkpoints") or len(set(values)) < len(values):
                raise OptionError(f"{name} is {abridged(list(values))}; expected one or more, each once")
        if (len(self.side) > 1 or self.checkpoints) and "TrackStar" not in self.methods:
            raise OptionError("several sides, or checkpoints, are compared by TrackStar's rankings; name it in methods")
        if "embeddings" in self.methods and self.embedding_model is None:
            raise OptionError("embedding_model is not given; the method embeddings needs a model folder")
        if self.tail_patch is not None:
            _check_tail_patch(self.tail_patch, self)


def read_config(path: str | os.PathLike[str]) -> EvaluationConfig:
    """Read a report's settings; paths in them are relative to the file's folder.

    Raises:
        OptionError: The file cannot be read, or a key or value is not one of `EvaluationConfig`; the message names it.
    """
    file = Path(path)
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"{file}: cannot be read ({error.strerror}); expected a report's settings") from None
    except (ValueError, RecursionError) as error:  # not TOML, not UTF-8, a number of thousands of digits
        raise OptionError(f"{file}: is not TOML ({one_line(error)}); expected a report's settings") from None
    table = content.pop("tail_patch", None)
    try:
        if table is not None:
            content["tail_patch"] = TailPatchConfig(**_fields(TailPatchConfig, table, "tail_patch."))
        settings = _fields(EvaluationConfig, content, "")
        for name in ("corpus", "facts", "embedding_model"):
            if isinstance(settings.get(name), str):
                settings[name] = str(file.parent / _expanded(settings[name]))
        if settings.get("second_moment", "auto") not in ("auto", "estimate", "none"):
            settings["second_moment"] = str(file.parent / _expanded(settings["second_moment"]))
        for name in ("model", "entailment_model"):
            if isinstance(settings.get(name), str):
                settings[name] = _resolved(file.parent, settings[name])
        if "checkpoints" in settings:
            settings["checkpoints"] = tuple(_resolved(file.parent, name) for name in settings["checkpoints"])
        return EvaluationConfig(**settings)
    except OptionError as error:
        raise OptionError(f"{file}: {error}") from None


def _resolved(folder: Path, name: str) -> str:
    """A path relative to the settings' folder where there is something; else the name itself, such as a hub's.

    Raises:
        OptionError: It can only be a path, and nothing is there.
    """
    beside = folder / _expanded(name)
    try:
        if beside.exists():
            return str(beside)
        first = folder / Path(name).parts[0]
        if name.startswith((".", "~", "/")) or name.endswith(".gguf") or name.count("/") > 1 or first.exists():
            raise OptionError(f"{beside}: no such model; expected a folder, a .gguf file, or a hub name")
    except OSError as error:
        raise OptionError(f"{abridged(name)}: no path ({error.strerror}); expected a model's folder or name") from None
    return name


def _expanded(name: str) -> Path:
    """The path with `~` as a home folder.

    Raises:
        OptionError: Nobody of that name is known here.
    """
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise OptionError(f"{abridged(name)}: no path ({error}); write the folder in full") from None


def _fields(kind: Any, table: object, prefix: str) -> dict[str, Any]:
    """A table's values, checked against the fields of a dataclass and their types."""
    if not isinstance(table, dict):
        raise OptionError(f"{prefix.rstrip('.')} is {type(table).__name__}; expected a table")
    known = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(set(table) - set(known))
    if unknown:
        raise OptionError(f"{prefix}{one_line(unknown[0], 80)} is no setting; expected one of {', '.join(known)}")
    missing = [name for name, field in known.items() if field.default is dataclasses.MISSING and name not in table]
    if missing:
        raise OptionError(f"{prefix}{missing[0]} is missing; give it")
    return {name: _value(f"{prefix}{name}", known[name].type, value) for name, value in table.items()}


_LISTS: dict[Any, Any] = {tuple[str, ...]: str, tuple[int, ...]: int, tuple[float, ...]: float}


def _value(name: str, kind: Any, value: Any) -> Any:
    if isinstance(value, TailPatchConfig):
        return value
    if kind in _LISTS:
        values = value if isinstance(value, list) else [value]
        return tuple(_value(name, _LISTS[kind], one) for one in values)
    expected: tuple[type, ...] = {
        str: (str,), str | None: (str,), bool: (bool,), int: (int,), int | None: (int,),
        float: (float, int), float | None: (float, int),
    }[kind]  # fmt: skip
    if not isinstance(value, expected) or (isinstance(value, bool) and bool not in expected):
        raise OptionError(f"{name} is {abridged(value)}; expected {' or '.join(one.__name__ for one in expected)}")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise OptionError(f"{name} is {abridged(value)}; expected a number of at most 64 bits")
    return float(value) if float in expected else value


def _choices(name: str, values: tuple[str, ...], choices: tuple[str, ...]) -> None:
    for value in values:
        if value not in choices:
            raise OptionError(f"{name}: {abridged(value)} is unknown; expected one of {', '.join(map(repr, choices))}")


def _check_tail_patch(config: TailPatchConfig, whole: EvaluationConfig) -> None:
    _choices("tail_patch.methods", config.methods, whole.methods)
    _choices("tail_patch.path", (config.path,), ("fast", "exact"))
    if not config.top_k or min(config.top_k) < 1 or max(config.top_k) > whole.top_k:
        raise OptionError(
            f"tail_patch.top_k is {abridged(list(config.top_k))}; expected numbers from 1 to top_k = {whole.top_k}"
        )
    if config.queries < 0:
        raise OptionError(f"tail_patch.queries is {config.queries}; expected 0 (all) or more")
    rates = config.learning_rate
    if len(set(rates)) < len(rates) or not all(math.isfinite(rate) and rate > 0 for rate in rates):
        raise OptionError(
            f"tail_patch.learning_rate is {abridged(list(rates))}; expected finite numbers above 0, each once"
        )
