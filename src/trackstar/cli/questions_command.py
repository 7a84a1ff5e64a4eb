"""The command `trackstar questions`: sums, word problems and story prompts as a file of queries."""

import json
from pathlib import Path

import click

from trackstar.choices import QUESTION_TASKS, QuestionTask
from trackstar.cli.framework import Command, prepare
from trackstar.cli.options import check_local, choice, note, rare


@click.command(cls=Command, example="trackstar questions --task arithmetic --count 20 --out demo-out/sums.jsonl")
@choice("--task", QUESTION_TASKS, required=True, help="Kind of questions.")
@click.option("--count", type=int, default=100, metavar="N", help="Number of questions.")
@click.option("--out", required=True, metavar="FILE", help="File of the questions (.jsonl).")
@click.option("--seed", type=int, default=0, metavar="N", help="Seed of their choice.")
@rare("--force", is_flag=True, help="Replace an existing file.")
def questions(*, task: QuestionTask, count: int, out: str, seed: int, force: bool) -> None:
    """Write questions that are not about facts.

    Writes simple sums, word problems with one step of arithmetic, or prompts for stories, as queries
    for the commands query, generate and evaluate.
    """
    prepare(None)
    check_local(out)
    from trackstar.evaluation.made_questions import made_questions
    from trackstar.store.files.outputs import check_can_write, check_replaceable, replace_text

    path = Path(out)
    lines = made_questions(task, count, seed=seed)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    check_replaceable(path, lambda file: file.read_text(encoding="utf-8") == text, force=force)
    check_can_write(path)
    replace_text(path, text)
    note(f"{path}: {len(lines):,} questions")
