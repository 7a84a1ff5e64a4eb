"""What an answer was asked of: queries, index or stream, task and settings, with digests."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Literal

from trackstar.corpus import Query
from trackstar.store import Index, Manifest


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class QueriesEntry:
    """A set of queries: how many, and `queries_digest` of them."""

    count: int
    digest: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class QuestionEntry:
    """The options of the question; None is what a rule decided.

    Attributes:
        top: How many proponents and opponents were asked for.
        mixing: λ as given.
        damping: Damping as given.
        reranked: How many were to be ranked again from recomputed gradients.
        exact: Whether every candidate's gradient was computed.
        batch_tokens: Most tokens of a batch.
        task: The queries that R_eval comes from; None where it comes from those that are asked.
        prompt_field: The field of the queries' file that held the prompt.
    """

    top: int
    mixing: float | None
    damping: float | None
    reranked: int | None
    exact: bool
    batch_tokens: int
    task: QueriesEntry | None
    prompt_field: str | None

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
        """The options as they were given."""
        return cls(
            top=top,
            mixing=None if mixing is None else float(mixing),
            damping=None if damping is None else float(damping),
            reranked=reranked,
            exact=exact,
            batch_tokens=batch_tokens,
            task=None if task is None else queries_entry(task),
            prompt_field=None,
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class IndexEntry:
    """The index that was asked.

    Attributes:
        path: Its folder (descriptive).
        identity: Its manifest's identity digest, which every shard carries.
        content: BLAKE2b-256 of its manifest's `completion`: the digests of every shard and of R_train.
        manifest_file: BLAKE2b-256 of manifest.json's bytes, as `b2sum -l 256` gives it; these say where the model lay,
            too (descriptive).
        r_train: `tensors_digest` of R_train; None where it is in `made_with.whitening`.
    """

    path: str
    identity: str
    content: str
    manifest_file: str
    r_train: str | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StreamEntry:
    """A corpus that was gone through without an index.

    Attributes:
        second_moment: How V was asked for.
        second_moment_examples: How many examples V is estimated from, where it is.
        whitening_examples: How many records R_train was to come from.
        r_train_examples: How many examples it is the mean of.
        r_train: `tensors_digest` of R_train under the name `autocorrelation`.
    """

    second_moment: Literal["auto", "estimate", "none", "given"]
    second_moment_examples: int
    whitening_examples: int
    r_train_examples: int
    r_train: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a report's scores were asked for and made with; a report carries it until an audit is written.

    Attributes:
        question: The options.
        made_with: The index's manifest without its completion. Without an index, that of the float32 index of projected
            gradients whose scores a pass over the corpus gives.
        index: The index.
        stream: The pass over the corpus; exactly one of both is there.
        device: Where gradients were computed.
    """

    question: QuestionEntry
    made_with: Manifest
    index: IndexEntry | None
    stream: StreamEntry | None
    device: str

    @classmethod
    def of_index(cls, index: Index, question: QuestionEntry, *, device: str) -> "Asked | None":
        """A question to an index; None where it is unfinished, and so has no digests yet."""
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
                manifest_file=digest_of_bytes(manifest.to_json().encode("ascii")),
                r_train=manifest.completion.autocorrelation_digest,
            ),
            stream=None,
            device=device,
        )


def queries_entry(queries: Sequence[Query]) -> QueriesEntry:
    """How many they are, and their digest."""
    return QueriesEntry(count=len(queries), digest=queries_digest(queries))


def queries_digest(queries: Iterable[Query]) -> str:
    """BLAKE2b-256 of one line a query: the JSON list of its name, prompt and completion, in ASCII without spaces."""
    digest = hashlib.blake2b(digest_size=32)
    for query in queries:
        line = json.dumps([query.query_id, query.prompt, query.completion], separators=(",", ":"))
        digest.update(f"{line}\n".encode("ascii"))
    return digest.hexdigest()


def content_digest(manifest: Manifest) -> str:
    """BLAKE2b-256 of a finished index's `completion` as JSON without spaces: it has the digests of all its files."""
    assert manifest.completion is not None, "only a finished index is asked"
    return digest_of_bytes(json.dumps(dataclasses.asdict(manifest.completion), separators=(",", ":")).encode("ascii"))


def digest_of_bytes(content: bytes) -> str:
    """BLAKE2b-256, in hexadecimal."""
    return hashlib.blake2b(content, digest_size=32).hexdigest()
