"""Questions of our own making for tasks that are not about facts (Appendix A.5): sums, word problems and
stories.

The paper's own lists are not published; these have their form. Equal counts and seeds give equal
questions on every machine, and a smaller set is the beginning of a larger one.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from trackstar.choices import QUESTION_TASKS, QuestionTask
from trackstar.corpus.digests import draw_bytes
from trackstar.errors import OptionError, check_at_least, check_choice

Item = TypeVar("Item")

_ID_OF: dict[QuestionTask, str] = {"arithmetic": "sum", "word-problems": "word-problem", "stories": "story"}

_LARGEST = 99
_NAMES = (
    "Ada", "Bruno", "Carla", "Dmitri", "Elif", "Farah", "Goran", "Hana", "Ivo", "Jun", "Kofi", "Lena", "Marta", "Nils",
    "Olga", "Pavel", "Rosa", "Samir", "Tala", "Yusuf",
)  # fmt: skip
_THINGS = (
    "apples", "books", "buttons", "candles", "coins", "cups", "eggs", "lemons", "marbles", "nails", "pencils", "shells",
    "spoons", "stamps", "tickets",
)  # fmt: skip

_PROBLEMS: tuple[tuple[str, Callable[[int, int], int], int], ...] = (
    ("{name} has {a} {things} and finds {b} more. How many {things} does {name} have now?", lambda a, b: a + b, 60),
    ("There are {a} {things} on one shelf and {b} on another. How many are there in all?", lambda a, b: a + b, 60),
    ("{name} sold {a} {things} in the morning and {b} at night. How many were sold that day?", lambda a, b: a + b, 60),
    ("{name} had {sum} {things} and gave away {b}. How many {things} are left?", lambda a, _: a, 60),
    ("A box holds {sum} {things}. {name} takes out {b}. How many {things} stay in the box?", lambda a, _: a, 60),
    ("{name} needs {sum} {things} and has {b}. How many {things} are missing?", lambda a, _: a, 60),
    ("{name} fills {a} bags with {b} {things} each. How many {things} is that?", lambda a, b: a * b, 12),
    ("A crate has {a} rows of {b} {things}. How many {things} are in the crate?", lambda a, b: a * b, 12),
    ("{name} pays {b} cents for each of {a} {things}. How many cents does {name} pay?", lambda a, b: a * b, 12),
    ("{name} divides {product} {things} among {b} friends. How many {things} does each get?", lambda a, _: a, 12),
    ("{product} {things} are packed in boxes of {b}. How many boxes are filled?", lambda a, _: a, 12),
)  # fmt: skip
"""Problem, its answer from two numbers, and the largest of these."""

_WHO = (
    "a lighthouse keeper", "a young baker", "an old sailor", "a shy inventor", "a travelling clockmaker", "a girl who "
    "collects maps", "a retired postman", "the last beekeeper of the valley", "two brothers", "a night watchman",
)  # fmt: skip
_WHAT = (
    "found a letter that was addressed to nobody", "heard music from the cellar", "bought a boat without a sail",
    "saw a light on the frozen lake", "opened a door that had not been there the day before",
    "met a dog that seemed to know the way", "lost the only key to the tower", "began to dig in the garden",
    "missed the last train home", "received a parcel full of feathers",
)  # fmt: skip
_OPENINGS = (
    "One morning, {who} {what}.", "Nobody believed it when {who} {what}.", "It had rained for days when {who} {what}.",
    "Write a short story in which {who} {what}.\n\nStory:", "Once upon a time, {who} {what}.",
)  # fmt: skip


def made_questions(task: QuestionTask, count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Questions of a task as lines of a query file.

    Args:
        task: `arithmetic`: sums of two numbers from 1 to 99, such as `7 + 5 =`; `word-problems`: one
            step of arithmetic in a sentence or two; `stories`: the beginnings of stories, or requests
            for one, which have no completion.
        count: Number of questions.
        seed: Seed of their choice.

    Returns:
        One record per question: `query_id`, `kind`, `task`, `prompt` and, but for stories,
        `completion`.

    Raises:
        OptionError: There is no such task, or it has fewer different questions.
    """
    check_choice("task", task, QUESTION_TASKS)
    check_at_least("count", count)
    check_at_least("seed", seed, 0)
    questions = list(itertools.islice(_MAKERS[task](seed), count))
    if len(questions) < count:
        raise OptionError(
            f"`count`: expected at most {len(questions):,}, of which {task} has different questions, found {count:,}"
        )
    kind = "open" if task == "stories" else "generation"
    return [
        {"query_id": f"{_ID_OF[task]}-{number}", "kind": kind, "task": task, **question}
        for number, question in enumerate(questions, start=1)
    ]


def _sums(seed: int) -> Iterator[dict[str, str]]:
    pairs = list(itertools.product(range(1, _LARGEST + 1), repeat=2))
    for a, b in _shuffled(pairs, seed, "sum"):
        yield {"prompt": f"{a} + {b} =", "completion": str(a + b)}


def _word_problems(seed: int) -> Iterator[dict[str, str]]:
    """Every problem in turn, each time with other numbers."""
    numbers = [
        _shuffled(list(itertools.product(range(2, most + 1), repeat=2)), seed, text) for text, _, most in _PROBLEMS
    ]
    names, things = (_shuffled(list(words), seed, "words") for words in (_NAMES, _THINGS))
    for turn in range(max(map(len, numbers))):
        for which, ((text, answer, _), pairs) in enumerate(zip(_PROBLEMS, numbers, strict=True)):
            if turn < len(pairs):
                a, b = pairs[turn]
                place = turn * len(_PROBLEMS) + which
                problem = text.format(
                    a=a, b=b, sum=a + b, product=a * b, name=names[place % len(names)],
                    things=things[place % len(things)],
                )  # fmt: skip
                yield {"prompt": f"{problem[0].upper()}{problem[1:]}\nAnswer:", "completion": str(answer(a, b))}


def _stories(seed: int) -> Iterator[dict[str, str]]:
    for opening, who, what in _shuffled(list(itertools.product(_OPENINGS, _WHO, _WHAT)), seed, "story"):
        yield {"prompt": opening.format(who=who, what=what)}


def _shuffled(items: Sequence[Item], seed: int, name: str) -> list[Item]:
    """The items in an order that depends on the seed and on nothing of the machine."""
    return sorted(items, key=lambda item: draw_bytes(f"{name} {item}".encode(), key=f"trackstar questions {seed}"))


_MAKERS: dict[QuestionTask, Callable[[int], Iterator[dict[str, str]]]] = {
    "arithmetic": _sums,
    "word-problems": _word_problems,
    "stories": _stories,
}
