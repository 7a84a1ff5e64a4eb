"""The model's own answers to a report's questions, and which are right (Table A.7 and Appendix A.5)."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from trackstar.attribution.verdicts import log_probabilities_of_choice, own_answer, preferred
from trackstar.corpus import Query
from trackstar.corpus.matching import answer_is_correct
from trackstar.errors import OptionError
from trackstar.evaluation.config import EvaluationConfig
from trackstar.evaluation.facts import Entity, Fact, to_queries
from trackstar.evaluation.workspace import Workspace
from trackstar.model.language_model import LanguageModel
from trackstar.progress import Progress
from trackstar.text import one_line

_TOKENS, _OPEN_TOKENS = 12, 32
_NUMBER = re.compile(r"[-−]?[$€£¥]?(?>\d{1,3}(?:,\d{3})+|\d+|(?=\.\d))(?>(?:\.\d+)?)(?![\d/]|[.,]\d)")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OwnAnswers:
    """The model's answers, in the order of the questions.

    Attributes:
        texts: Each answer, decoded greedily; of a choice, the completion that the model prefers.
        correct: Whether it is right; false for an open question.
        judged: Whether the question has a right answer.
    """

    texts: tuple[str, ...]
    correct: Bool[np.ndarray, "facts"]
    judged: Bool[np.ndarray, "facts"]


def own_answers(
    facts: Sequence[Fact], model: LanguageModel, workspace: Workspace, config: EvaluationConfig, *, progress: bool
) -> OwnAnswers:
    """The model's answers to the main prompts, from the report's folder if they are there.

    Args:
        facts: The questions.
        model: The model.
        workspace: The report's folder.
        config: Settings of the report.
        progress: Whether progress is shown.
    """
    queries = to_queries(facts, config.templates[0])
    closed = [query for query in queries if query.kind in ("fact", "generation")]
    longest = max((_tokens(query, model) for query in closed if query.kind == "generation"), default=0)
    said = _said("answers", closed, max(_TOKENS, longest + 4), model, workspace, progress)
    said |= _said("open answers", [q for q in queries if q.kind == "open"], _OPEN_TOKENS, model, workspace, progress)
    chosen = _chosen([q for q in queries if q.kind == "choice"], model, workspace, config, progress)
    texts, correct = [], []
    for fact, query in zip(facts, queries, strict=True):
        if fact.kind == "choice":
            best = preferred(chosen[fact.fact_id])
            texts.append((query.completion, *fact.alternatives)[best])
            correct.append(best == 0)
        else:
            texts.append(said[fact.fact_id])
            right = answer_is_correct(texts[-1], fact.object.name, fact.object.aliases)
            correct.append(fact.kind != "open" and right)
    judged = np.array([fact.kind != "open" for fact in facts])
    return OwnAnswers(texts=tuple(texts), correct=np.array(correct), judged=judged)


def with_own_completions(facts: Sequence[Fact], answers: OwnAnswers) -> tuple[Fact, ...]:
    """The questions, of which open ones without a completion have the model's own answer as theirs.

    Raises:
        OptionError: The model says nothing.
    """
    completed = []
    for fact, text in zip(facts, answers.texts, strict=True):
        if not fact.object.name.strip() and not text:
            raise OptionError(
                f"`facts`: the open question {one_line(fact.fact_id)} has no completion, and the model says nothing "
                "after its prompt; add a completion, or leave the question out"
            )
        name = fact.object.name if fact.object.name.strip() else text
        completed.append(dataclasses.replace(fact, object=dataclasses.replace(fact.object, name=name)))
    return tuple(completed)


def wrong_fact(fact: Fact, answer: str, template: int) -> Fact | None:
    """The question with the model's wrong answer as its completion; None if the model says nothing."""
    completion = answer if fact.kind == "choice" else first_phrase(answer)
    if not completion:
        return None
    return dataclasses.replace(fact, object=Entity(name=completion), prompts=(fact.prompts[template],))


def first_phrase(answer: str) -> str:
    """The part of a model's answer before the first punctuation mark; the number, if it begins with one."""
    number = _NUMBER.match(answer.strip())
    if number:
        return number.group()
    text = answer.strip(" .,;:!?\n")
    return re.split(r"[.,;:!?](?=\s|$)|\n", text, maxsplit=1)[0].strip()


def _said(
    name: str, queries: Sequence[Query], tokens: int, model: LanguageModel, workspace: Workspace, progress: bool
) -> dict[str, str]:
    """The greedy answers of at most so many tokens, by the question's name."""

    def compute() -> list[str]:
        with Progress("Answers of the model", unit="queries", total=len(queries), shown=progress) as bar:
            answers = []
            for query in queries:
                answers.append(own_answer(model, query, max_new_tokens=tokens))
                bar.advance(1)
            return answers

    sources: dict[str, Any] = {
        "model": model.digest(),
        "tokenizer": model.tokenizer_digest(),
        "prompts": [query.prompt for query in queries],
    }
    if tokens != _TOKENS:
        sources["max_new_tokens"] = tokens
    answers = workspace.result(name, sources, compute) if queries else []
    return {query.query_id: answer for query, answer in zip(queries, answers, strict=True)}


def _chosen(
    queries: Sequence[Query], model: LanguageModel, workspace: Workspace, config: EvaluationConfig, progress: bool
) -> dict[str, list[float]]:
    """log P of each choice's completions, the right one first, by the question's name."""

    def compute() -> list[list[float]]:
        with Progress("Choices of the model", unit="queries", total=len(queries), shown=progress) as bar:
            found = []
            for query in queries:
                found.append(list(log_probabilities_of_choice(model, query, config.batch_tokens)))
                bar.advance(1)
            return found

    sources: dict[str, Any] = {
        "model": model.digest(),
        "tokenizer": model.tokenizer_digest(),
        "choices": [[query.prompt, query.completion, *query.alternatives] for query in queries],
    }
    values = workspace.result("choices", sources, compute) if queries else []
    return {query.query_id: one for query, one in zip(queries, values, strict=True)}


def _tokens(query: Query, model: LanguageModel) -> int:
    return len(model.tokenizer(query.completion, add_special_tokens=False)["input_ids"])
