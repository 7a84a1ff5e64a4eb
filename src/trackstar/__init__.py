"""Find the training examples that made a language model say something: TrackStar (Chang et al.,
ICLR 2025).

    import trackstar

    index = trackstar.build_index("path/to/model", "corpus.jsonl", "index")
    query = trackstar.Query(query_id="q", prompt="The capital of France is", completion="Paris")
    report = trackstar.answer_queries(index, [query], k=10)

Names are imported when they are first used, so that `import trackstar` is instant. Only the names
in `__all__` are public and stable.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trackstar.attribution.answering import answer_queries, query_gradients
    from trackstar.attribution.attributor import Attribution, Attributor, TokenInfluence
    from trackstar.attribution.results import QueryReport, QueryResult, Ranked
    from trackstar.attribution.streaming import stream_queries
    from trackstar.attribution.writing import write_results
    from trackstar.audit.checks import AtHand, AuditReport, Check
    from trackstar.audit.recomputation import check_audit
    from trackstar.audit.record import Audit, read_audit
    from trackstar.audit.writing import write_audit
    from trackstar.corpus import Corpus, Example, Query, open_corpus, read_queries
    from trackstar.editing.adding import add_examples
    from trackstar.editing.converting import convert_index
    from trackstar.editing.merging import merge_indexes
    from trackstar.editing.narrowing import narrow_index
    from trackstar.editing.removing import remove_examples
    from trackstar.errors import OptionError, TrackstarError
    from trackstar.indexing.array_tasks import finish_index
    from trackstar.indexing.build import build_index
    from trackstar.indexing.plan import IndexPlan, plan_index
    from trackstar.indexing.settings import IndexSettings
    from trackstar.model.generation import Generation, generate, generate_samples
    from trackstar.model.generation_settings import GenerationSettings
    from trackstar.model.language_model import LanguageModel, load_model, wrap_model
    from trackstar.pretraining import PretrainingConfig, pretrain
    from trackstar.store import Index, verify
    from trackstar.workers.index_model import model_of_index

__all__ = [
    "AtHand",
    "Attribution",
    "Attributor",
    "Audit",
    "AuditReport",
    "Check",
    "Corpus",
    "Example",
    "Generation",
    "GenerationSettings",
    "Index",
    "IndexPlan",
    "IndexSettings",
    "LanguageModel",
    "OptionError",
    "PretrainingConfig",
    "Query",
    "QueryReport",
    "QueryResult",
    "Ranked",
    "TokenInfluence",
    "TrackstarError",
    "add_examples",
    "answer_queries",
    "build_index",
    "check_audit",
    "convert_index",
    "finish_index",
    "generate",
    "generate_samples",
    "load_model",
    "merge_indexes",
    "model_of_index",
    "narrow_index",
    "open_corpus",
    "plan_index",
    "pretrain",
    "query_gradients",
    "read_audit",
    "read_queries",
    "remove_examples",
    "stream_queries",
    "verify",
    "wrap_model",
    "write_audit",
    "write_results",
]

_HOMES = {
    "trackstar.attribution.answering": ("answer_queries", "query_gradients"),
    "trackstar.attribution.attributor": ("Attribution", "Attributor", "TokenInfluence"),
    "trackstar.attribution.results": ("QueryReport", "QueryResult", "Ranked"),
    "trackstar.attribution.streaming": ("stream_queries",),
    "trackstar.attribution.writing": ("write_results",),
    "trackstar.audit.recomputation": ("check_audit",),
    "trackstar.audit.checks": ("AtHand", "AuditReport", "Check"),
    "trackstar.audit.record": ("Audit", "read_audit"),
    "trackstar.audit.writing": ("write_audit",),
    "trackstar.corpus": ("Corpus", "Example", "Query", "open_corpus", "read_queries"),
    "trackstar.editing.adding": ("add_examples",),
    "trackstar.editing.converting": ("convert_index",),
    "trackstar.editing.merging": ("merge_indexes",),
    "trackstar.editing.narrowing": ("narrow_index",),
    "trackstar.editing.removing": ("remove_examples",),
    "trackstar.errors": ("OptionError", "TrackstarError"),
    "trackstar.indexing.array_tasks": ("finish_index",),
    "trackstar.indexing.build": ("build_index",),
    "trackstar.indexing.plan": ("IndexPlan", "plan_index"),
    "trackstar.indexing.settings": ("IndexSettings",),
    "trackstar.model.generation": ("Generation", "generate", "generate_samples"),
    "trackstar.model.generation_settings": ("GenerationSettings",),
    "trackstar.model.language_model": ("LanguageModel", "load_model", "wrap_model"),
    "trackstar.pretraining": ("PretrainingConfig", "pretrain"),
    "trackstar.store": ("Index", "verify"),
    "trackstar.workers.index_model": ("model_of_index",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
