"""The sums of the arithmetic demo: what is trained on, what is held out, and what two sums share."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Int

from trackstar.corpus import Query
from trackstar.corpus.digests import draw_bytes
from trackstar.pretraining import PretrainingConfig

LARGEST = 99
"""Largest result; the smallest operand is 0."""

HELD_OUT_SHARE = 1 / 5
"""Share of the sums that the model is asked and never trained on."""

ARITHMETIC_PRETRAINING = PretrainingConfig(
    width=64,
    layers=2,
    heads=4,
    mlp_width=256,
    context_tokens=32,
    vocabulary=260,
    initial_spread=0.05,
    base_learning_rate=0.4,
    warmup_steps=120,
    steps=650,
    batch_tokens=1024,
    pool_examples=72,
    checkpoint_steps=325,
)
"""A model of 0.15 million parameters, trained for about a minute on one core.

The vocabulary has room for two merges, ` +` and ` =`, which are in every line. So every digit is a token
of its own, and so is the space before a number: with merged digits, 100 numbers would be 100 unrelated
tokens. A pool is about a batch, so that batches mix numbers of all lengths: with batches of equal lengths
the accuracy jumps from step to step. The run ends before the model is perfect, so that there are wrong
answers to explain.
"""

CARRY = "carry or no carry"

PROPERTIES = (
    "mirrored sum (b + a)",
    "first operand",
    "second operand",
    "an operand, in the other place",
    "neighbour (one operand ±1)",
    "units digits of both operands",
    "tens digits of both operands",
    CARRY,
    "result",
    "result ±1",
    "units digit of the result",
    "tens digit of the result",
)
"""What a training sum can share with a question and its answer; see `shared_with`."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Sum:
    """A sum of two numbers; `7 + 5` and `5 + 7` are two sums, each the other's mirrored sum."""

    first: int
    second: int

    @property
    def result(self) -> int:
        """The true result."""
        return self.first + self.second

    @property
    def carry(self) -> bool:
        """Whether the units digits add up to 10 or more."""
        return self.first % 10 + self.second % 10 >= 10

    @property
    def mirrored(self) -> "Sum":
        """The sum with its operands exchanged."""
        return Sum(first=self.second, second=self.first)

    @property
    def name(self) -> str:
        """Name in corpus and queries, such as `7+5`."""
        return f"{self.first}+{self.second}"

    @property
    def prompt(self) -> str:
        """The question, such as `7 + 5 =`."""
        return f"{self.first} + {self.second} ="

    @property
    def text(self) -> str:
        """The training text, such as `7 + 5 = 12`."""
        return f"{self.prompt} {self.result}"

    @property
    def query(self) -> Query:
        """The question with its true result as completion."""
        record = {"kind": "generation", "task": "arithmetic"}
        return Query(query_id=self.name, prompt=self.prompt, completion=str(self.result), record=record)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """Sums to train on and sums to ask, each in random order.

    Attributes:
        training: One training example each.
        held_out: One query each; none of them is trained on.
    """

    training: tuple[Sum, ...]
    held_out: tuple[Sum, ...]


def drawn_sums(seed: int, *, largest: int = LARGEST) -> Sums:
    """Split all sums up to a result; a seed gives the same split and order on every machine.

    Each sum is drawn on its own, not with its mirrored sum. So most held-out sums have their mirrored
    sum among the training examples, and some do not: the demo measures both groups.
    """
    every = [Sum(first=first, second=second) for first in range(largest + 1) for second in range(largest + 1 - first)]
    every.sort(key=lambda one: draw_bytes(f"{seed}\n{one.name}".encode()))
    held_out = round(HELD_OUT_SHARE * len(every))
    return Sums(training=tuple(every[held_out:]), held_out=tuple(every[:held_out]))


def record_of(one: Sum) -> dict[str, object]:
    """The corpus record of a training sum."""
    return {
        "id": one.name,
        "text": one.text,
        "first": one.first,
        "second": one.second,
        "result": one.result,
        "carry": "carry" if one.carry else "no carry",
    }


def number_in(answer: str) -> int | None:
    """The number that an answer consists of; None if it is anything else."""
    text = answer.strip()
    return int(text) if text.isascii() and text.isdigit() else None


def shared_with(asked: Sum, answer: int | None, training: Sequence[Sum]) -> Mapping[str, Bool[np.ndarray, "training"]]:
    """What each training sum shares with a question and one answer to it, by property.

    Args:
        asked: The question, a + b.
        answer: The answer that is explained, right or wrong; None is no number, and shares nothing.
        training: Training sums c + d.

    Returns:
        For each of `PROPERTIES`, one truth value per training sum. Operands and digits are compared in
        their places: the units digits of both operands are shared if c ends like a, and d like b. The
        carry is that of the operands, and the result is the answer that is explained.
    """
    a, b = asked.first, asked.second
    c, d = operands(training)
    result = c + d
    said = -100 if answer is None else answer
    return dict(
        zip(
            PROPERTIES,
            (
                (c == b) & (d == a),
                c == a,
                d == b,
                (c == b) | (d == a),
                abs(c - a) + abs(d - b) == 1,
                (c % 10 == a % 10) & (d % 10 == b % 10),
                (c // 10 == a // 10) & (d // 10 == b // 10),
                (c % 10 + d % 10 >= 10) == asked.carry,
                result == said,
                abs(result - said) == 1,
                (result % 10 == said % 10) & (said >= 0),
                result // 10 == said // 10,
            ),
            strict=True,
        )
    )


def operands(sums: Sequence[Sum]) -> tuple[Int[np.ndarray, "sums"], Int[np.ndarray, "sums"]]:
    """First and second operands."""
    return np.array([one.first for one in sums], dtype=np.int64), np.array([one.second for one in sums], dtype=np.int64)
