"""Which training examples made this language model say that? TrackStar (Chang et al., ICLR 2025) in full.

    import trackstar

    index = trackstar.build_index("path/to/model", "corpus.jsonl", "index")
    query = trackstar.Query(query_id="q", prompt="The capital of France is", completion="Paris")
    report = trackstar.answer_queries(index, [query], k=10)

Names are imported when they are first used, so that `import trackstar` and `trackstar --help` are instant.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trackstar.attribution import Attribution, Attributor, TokenInfluence
    from trackstar.audit import AtHand, AuditReport, Check, write_audit
    from trackstar.audit_again import check_audit
    from trackstar.audit_record import Audit, read_audit
    from trackstar.errors import TrackstarError
    from trackstar.examples import Corpus, Example, Query, open_corpus, read_queries
    from trackstar.generation import generate
    from trackstar.growing import add_examples
    from trackstar.model import LanguageModel, load_model, wrap_model
    from trackstar.narrowing import narrow_index
    from trackstar.pipeline import answer_queries, build_index, query_gradients
    from trackstar.pretraining import PretrainingConfig, pretrain
    from trackstar.provenance import model_of_index
    from trackstar.results import QueryReport, QueryResult, Ranked, write_results
    from trackstar.rewriting import convert_index, merge_indexes, remove_examples
    from trackstar.store import Index, verify
    from trackstar.streaming import stream_queries

__all__ = [
    "AtHand",
    "Attribution",
    "Attributor",
    "Audit",
    "AuditReport",
    "Check",
    "Corpus",
    "Example",
    "Index",
    "LanguageModel",
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
    "generate",
    "load_model",
    "merge_indexes",
    "model_of_index",
    "narrow_index",
    "open_corpus",
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
    "trackstar.attribution": ("Attribution", "Attributor", "TokenInfluence"),
    "trackstar.audit": ("AtHand", "AuditReport", "Check", "write_audit"),
    "trackstar.audit_again": ("check_audit",),
    "trackstar.audit_record": ("Audit", "read_audit"),
    "trackstar.errors": ("TrackstarError",),
    "trackstar.examples": ("Corpus", "Example", "Query", "open_corpus", "read_queries"),
    "trackstar.generation": ("generate",),
    "trackstar.growing": ("add_examples",),
    "trackstar.model": ("LanguageModel", "load_model", "wrap_model"),
    "trackstar.narrowing": ("narrow_index",),
    "trackstar.pipeline": ("answer_queries", "build_index", "query_gradients"),
    "trackstar.pretraining": ("PretrainingConfig", "pretrain"),
    "trackstar.provenance": ("model_of_index",),
    "trackstar.results": ("QueryReport", "QueryResult", "Ranked", "write_results"),
    "trackstar.rewriting": ("convert_index", "merge_indexes", "remove_examples"),
    "trackstar.store": ("Index", "verify"),
    "trackstar.streaming": ("stream_queries",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
