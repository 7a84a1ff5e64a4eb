"""The question behind an answer, as an audit records it: queries, task, options, and index or
stream, with digests.
"""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Literal

from trackstar.choices import Join
from trackstar.corpus import Query, separator
from trackstar.corpus.digests import digest_of_bytes, digest_of_json, digest_of_parts
from trackstar.corpus.joining import joined
from trackstar.store import Index, Manifest


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class QueriesEntry:
    """A set of queries: their number, and their `queries_digest`."""

    count: int
    digest: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class QuestionEntry:
    """The options of a question; None if a rule decided.

    Attributes:
        top: Number of proponents and of opponents per query (`k`).
        mixing: λ as given.
        damping: Damping as given.
        reranked: Candidates to re-rank by recomputed gradients, as given.
        exact: Whether every candidate's gradient was recomputed.
        batch_tokens: Most tokens per batch.
        task: The queries that R_eval comes from; None if they are the question's own queries.
        prompt_field: Field of the queries' file that held the prompt.
        join: How the file's prompts and completions were joined.
    """

    top: int
    mixing: float | None
    damping: float | None
    reranked: int | None
    exact: bool
    batch_tokens: int
    task: QueriesEntry | None
    prompt_field: str | None
    join: Join

    @classmethod
    def of(
        cls,
        task: Sequence[Query] | None,
        *,
        top: int,
        mixing: float | None,
        damping: float | None,
        batch_tokens: int,
        reranked: int | None = None,
        exact: bool = False,
    ) -> "QuestionEntry":
        """The options as given."""
        return cls(
            top=top,
            mixing=None if mixing is None else float(mixing),
            damping=None if damping is None else float(damping),
            reranked=reranked,
            exact=exact,
            batch_tokens=batch_tokens,
            task=None if task is None else queries_entry(task),
            prompt_field=None,
            join="auto",
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class IndexEntry:
    """The queried index.

    Attributes:
        path: Its folder (descriptive).
        identity: Identity digest of its manifest, which every shard carries.
        content: BLAKE2b-256 of its manifest's `completion`: the digests of every shard and of
            R_train.
        manifest_file: BLAKE2b-256 of manifest.json's bytes, as `b2sum -l 256` gives it; these say
            where the model lay, too (descriptive).
        r_train: `tensors_digest` of R_train; None where it is in `made_with.whitening`.
    """

    path: str
    identity: str
    content: str
    manifest_file: str
    r_train: str | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StreamEntry:
    """A corpus that was streamed through the model without an index.

    Attributes:
        second_moment: How V was requested.
        second_moment_examples: Number of examples that V is estimated from, if it is.
        whitening_examples: Requested number of records for R_train.
        r_train_examples: Number of examples that R_train is the mean of.
        r_train: `tensors_digest` of R_train under the name `autocorrelation`.
    """

    second_moment: Literal["auto", "estimate", "none", "given"]
    second_moment_examples: int
    whitening_examples: int
    r_train_examples: int
    r_train: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """The question behind a report, and what its scores were computed with. `write_audit` writes it
    down.

    Attributes:
        question: The options.
        made_with: The index's manifest without its completion. For a streamed corpus, the manifest
            of the float32 index of projected gradients that has the same scores.
        index: The index; None for a streamed corpus.
        stream: The pass over the corpus; None for an index.
        device: Device that computed gradients.
    """

    question: QuestionEntry
    made_with: Manifest
    index: IndexEntry | None
    stream: StreamEntry | None
    device: str

    @classmethod
    def of_index(cls, index: Index, question: QuestionEntry, *, device: str) -> "Provenance | None":
        """The provenance of a question to an index; None for an unfinished index, which has no
        digests yet.
        """
        manifest = index.manifest
        if manifest.completion is None:
            return None
        return cls(
            question=question,
            made_with=dataclasses.replace(manifest, completion=None),
            index=IndexEntry(
                path=str(index.path),
                identity=manifest.identity_digest(),
                content=content_digest(manifest),
                manifest_file=digest_of_bytes(manifest.to_json().encode("ascii"), bits=256),
                r_train=manifest.completion.autocorrelation_digest,
            ),
            stream=None,
            device=device,
        )


def queries_entry(queries: Sequence[Query]) -> QueriesEntry:
    """Number and digest of queries."""
    return QueriesEntry(count=len(queries), digest=queries_digest(queries))


def queries_digest(queries: Iterable[Query]) -> str:
    """BLAKE2b-256 of one line per query: a JSON list in ASCII without spaces.

    The list holds the query's name, prompt and completion. If what stands between these two is not
    what `join="space"` puts there, that follows. For a query of tokens, whose texts are only for
    people, it holds the name, the token ids and the positions of the targets; for a query of
    messages the name, the messages, the tools and the chat template. Where the kind is known and not
    a fact, an object with it and the alternatives follows, as R_eval then leaves the query out.
    """
    lines = (json.dumps(_asked(query) + _kind(query), separators=(",", ":")) for query in queries)
    return digest_of_parts((f"{line}\n".encode("ascii") for line in lines), bits=256)


def _kind(query: Query) -> list[object]:
    if query.asks_for_fact:
        return []
    return [{"kind": query.kind, **({"alternative": list(query.alternatives)} if query.alternatives else {})}]


def _asked(query: Query) -> list[object]:
    if query.token_ids is not None:
        mask = query.target_mask or ()
        return [query.query_id, list(query.token_ids), [place for place, target in enumerate(mask) if target]]
    if query.messages is not None:
        return [query.query_id, list(map(dict, query.messages)), query.tools, query.chat_template]
    asked: list[object] = [query.query_id, query.prompt, query.completion]
    between = separator(query)
    spaced = joined(query.prompt, query.completion, "space")
    return asked if query.prompt + between + query.completion == spaced else [*asked, between]


def content_digest(manifest: Manifest) -> str:
    """BLAKE2b-256 of a finished index's `completion`, which holds the digests of its files, as JSON
    without spaces.
    """
    assert manifest.completion is not None, "only a finished index has a content digest"
    return digest_of_json(dataclasses.asdict(manifest.completion), compact=True, bits=256)
