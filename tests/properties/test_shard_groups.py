"""However a corpus is cut into records and shards, and whatever is there: each window's turn comes once, in order."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from unittest import mock

import hypothesis
import numpy as np
from hypothesis import strategies

from small_index import small_manifest
from trackstar.corpus import Example, TokenizedExample
from trackstar.indexing import groups as shard_groups
from trackstar.indexing.groups import CorpusPosition, FinishedShard, Group, ShardGroups
from trackstar.model.language_model import LanguageModel
from trackstar.store import ResumePoint


class Records:
    """A corpus whose records have these numbers of windows."""

    name = "records"

    def __init__(self, windows: Sequence[int]) -> None:
        self.windows = windows

    def examples(self, start: int = 0) -> Iterator[Example]:
        return (
            Example(example_id=f"r{record}", text="x" * self.windows[record], record=record)
            for record in range(start, len(self.windows))
        )


def tokenized(examples: Iterable[Example], *_: object, **__: object) -> Iterator[list[TokenizedExample]]:
    """A window a letter."""
    for example in examples:
        yield [
            TokenizedExample(
                example_id=f"{example.example_id}#{window}",
                parent_id=example.example_id,
                record=example.record,
                window=window,
                text="x",
                token_ids=np.arange(3, dtype=np.int32),
                target_mask=np.arange(3) > 0,
            )
            for window in range(len(example.text))
        ]


def shard_ends(windows: Sequence[int], shard_examples: int) -> list[tuple[list[tuple[int, int]], ResumePoint]]:
    """Each shard's windows and end, told one window after the other."""
    shards: list[tuple[list[tuple[int, int]], ResumePoint]] = []
    held: list[tuple[int, int]] = []
    skipped = row = 0
    end = ResumePoint(row=0, record=0, window=0, skipped=0)
    for record, count in enumerate(windows):
        skipped += count == 0
        for window in range(count):
            held.append((record, window))
            row += 1
            after = (record + 1, 0) if window + 1 == count else (record, window + 1)
            end = ResumePoint(row=row, record=after[0], window=after[1], skipped=skipped)
            if len(held) == shard_examples:
                shards.append((held, end))
                held = []
    return [*shards, (held, end)] if held else shards


@hypothesis.given(
    windows=strategies.lists(strategies.sampled_from([0, 0, 1, 1, 2, 5]), max_size=25),
    shard_examples=strategies.integers(1, 7),
    group_examples=strategies.integers(1, 9),
    data=strategies.data(),
)
@hypothesis.settings(max_examples=300)
def test_groups_and_finished_shards_are_all_windows_in_order(
    windows: list[int], shard_examples: int, group_examples: int, data: Any
) -> None:
    shards = shard_ends(windows, shard_examples)
    numbers = range(len(shards))
    finished = data.draw(strategies.sets(strategies.sampled_from(numbers))) if shards else set()
    wanted = data.draw(strategies.sets(strategies.sampled_from(numbers))) if shards else set()
    first = data.draw(strategies.integers(0, sum(end.row % shard_examples == 0 for _, end in shards)))
    start = shards[first - 1][1] if first else ResumePoint(row=0, record=0, window=0, skipped=0)
    queried: list[int] = []

    def finished_end(number: int) -> ResumePoint | None:
        queried.append(number)
        return shards[number][1] if number in finished else None

    with (
        mock.patch.object(shard_groups, "GROUP_EXAMPLES", group_examples),
        mock.patch.object(shard_groups, "tokenize_examples", tokenized),
    ):
        groups = ShardGroups(
            Records(windows),
            mock.Mock(spec=LanguageModel, tokenizer=None),
            dataclasses.replace(small_manifest(), shard_examples=shard_examples),
            start,
            finished=finished_end,
            wanted=wanted.__contains__,
        )
        given = list(groups)

    numbers_given = [item.shard for item in given]
    assert numbers_given == sorted(numbers_given)
    assert {item.shard for item in given if isinstance(item, FinishedShard)} == {n for n in finished if n >= first}
    made = {
        shard: [item for item in items if isinstance(item, Group)]
        for shard, items in itertools.groupby(given, lambda item: item.shard)
        if shard not in finished
    }
    assert made.keys() == {n for n in wanted - finished if n >= first}
    for shard, parts in made.items():
        expected, end = shards[shard]
        assert [(example.record, example.window) for part in parts for example in part.examples] == expected
        assert all(len(part.examples) <= group_examples for part in parts)
        assert parts[-1].after == CorpusPosition(record=end.record, window=end.window, skipped=end.skipped)
    assert len(queried) == len(set(queried)), "each shard is looked up once"
    assert groups.shards == len(shards)
    assert groups.rows == sum(windows)
    assert groups.end == CorpusPosition(record=len(windows), window=0, skipped=windows.count(0))
