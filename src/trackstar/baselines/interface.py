"""What every baseline is: a pool of candidates, and a score for each of them on each query."""

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
        """A score of every candidate on every query, float32 on the CPU; the higher, the better the rank.

        Candidates stand in the pool's order. A query's scores do not depend on the other queries. Memory is four
        bytes a pair: ask a few hundred queries at a time where there are many candidates.

        Raises:
            CorpusError: A query cannot be scored; the message names it.
        """
        ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """The candidates that are ranked, in order.

    Attributes:
        example_ids: Their names, each once.
        texts: Their texts.
        row_of: Each candidate's place, from 0, by name.

    Raises:
        CorpusError: There is no candidate, two have one name, or a text is none; the message names it.
    """

    example_ids: tuple[str, ...]
    texts: tuple[str, ...]
    row_of: Mapping[str, int] = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.example_ids) != len(self.texts):
            raise CorpusError(
                f"the pool has {len(self.example_ids)} names and {len(self.texts)} texts; expected one of each a "
                "candidate"
            )
        if not self.texts:
            raise CorpusError("the pool holds no candidate; expected at least one example to rank")
        row_of: dict[str, int] = {}
        for row, (example_id, text) in enumerate(zip(self.example_ids, self.texts, strict=True)):
            first = row_of.setdefault(example_id, row)
            if first != row:
                raise CorpusError(
                    f"example {example_id}: names candidates {first} and {row} of the pool; expected each name once"
                )
            encodable(text, f"example {example_id}: the text")
        object.__setattr__(self, "row_of", row_of)

    @classmethod
    def from_examples(cls, examples: Iterable[Example]) -> "Pool":
        """A pool of examples in their order; they are read once.

        Raises:
            CorpusError: There is none, two have one name, or one cannot be read.
        """
        pairs = [(example.example_id, example.text) for example in examples]
        return cls(example_ids=tuple(name for name, _ in pairs), texts=tuple(text for _, text in pairs))

    def __len__(self) -> int:
        return len(self.texts)
