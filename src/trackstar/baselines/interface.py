"""The interface of all baselines: a pool of candidates, and a score of each of them for each query."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from trackstar.corpus import Example, Query
from trackstar.corpus.fields import encodable
from trackstar.errors import CorpusError


@runtime_checkable
class Retriever(Protocol):
    """A method that ranks the candidates of a pool for queries."""

    @property
    def name(self) -> str:
        """The method's name in tables."""
        ...

    def scores(self, queries: Sequence[Query]) -> Float[Tensor, "queries candidates"]:
        """Score every candidate for every query, float32 on the CPU; higher scores rank first.

        Candidates are in the pool's order. A query's scores do not depend on the other queries,
        except where a method says so. The result has four bytes per score: with many candidates,
        pass a few hundred queries at a time.

        Raises:
            CorpusError: A query cannot be scored; the message names it.
        """
        ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """The candidates that are ranked, in order.

    Attributes:
        example_ids: Their ids, each once.
        texts: Their texts.
        row_of: Example id to the candidate's row, from 0.

    Raises:
        CorpusError: There is no candidate, two have the same id, or a text holds half a surrogate
            pair; the message names the example.
    """

    example_ids: tuple[str, ...]
    texts: tuple[str, ...]
    row_of: Mapping[str, int] = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.example_ids) != len(self.texts):
            raise CorpusError(
                f"the pool has {len(self.example_ids)} ids and {len(self.texts)} texts; expected one id and one text "
                "per candidate"
            )
        if not self.texts:
            raise CorpusError("the pool holds no candidate; expected at least one example to rank")
        row_of: dict[str, int] = {}
        for row, (example_id, text) in enumerate(zip(self.example_ids, self.texts, strict=True)):
            first = row_of.setdefault(example_id, row)
            if first != row:
                raise CorpusError(
                    f"example {example_id}: two candidates have this id, {first} and {row}; expected each id once"
                )
            encodable(text, f"example {example_id}: the text")
        object.__setattr__(self, "row_of", row_of)

    @classmethod
    def from_examples(cls, examples: Iterable[Example]) -> "Pool":
        """A pool of examples in their order; the examples are read once.

        Raises:
            CorpusError: There is no example, two have the same id, or one cannot be read.
        """
        pairs = [(example.example_id, example.text) for example in examples]
        return cls(example_ids=tuple(name for name, _ in pairs), texts=tuple(text for _, text in pairs))

    def __len__(self) -> int:
        return len(self.texts)
