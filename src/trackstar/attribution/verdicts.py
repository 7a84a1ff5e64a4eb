"""Whether a model answers a query right, by the kind of its task (paper, Table A.7 and Appendix A.5).

A fact or a generation is right where the model's own greedy answer begins with the right one. A choice is
right where the completion is more probable than every alternative. An open query has no right answer.
"""

import dataclasses
from collections.abc import Iterable, Sequence

from trackstar.choices import KINDS
from trackstar.corpus import Query, tokenize_query
from trackstar.corpus.kinds import is_right
from trackstar.corpus.queries import checked_tokens
from trackstar.model.completion_probabilities import measured_log_probabilities
from trackstar.model.generation import continuations, generate
from trackstar.model.generation_settings import GenerationSettings
from trackstar.model.language_model import LanguageModel
from trackstar.progress import Progress
from trackstar.text import one_line

_FURTHER_TOKENS = 8  # after as many as the right answer has
_SHORTEST = 16
_PLURALS = {"fact": "facts", "choice": "choices", "generation": "generations", "open": "open questions"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A model's own answer to a query, and whether it is right.

    Attributes:
        answer: What the model says, greedily; for a choice, the completion that it prefers.
        correct: Whether that is right.
        log_probabilities: Of a choice: those of the right completion and of each alternative, in nats.
    """

    answer: str
    correct: bool
    log_probabilities: tuple[float, ...] = ()


def verdicts(
    model: LanguageModel, queries: Sequence[Query], *, batch_tokens: int = 2048, progress: bool = True
) -> list[Verdict | None]:
    """A verdict on each query; None for an open one, and where the kind is unknown.

    A query whose completion is the model's own answer, with the right one as `truth`, is compared with that,
    whatever its kind but a choice.

    Args:
        model: The model.
        queries: The queries, as texts or messages if their alternatives are to be asked in a chat template.
        batch_tokens: Most tokens per batch, padding included.
        progress: Whether progress is shown if stderr is a terminal.

    Raises:
        OptionError: A prompt leaves no room for an answer in the model's context.
        CorpusError: A choice's alternative cannot be asked, or the other names of an answer are no names.
    """
    total = sum(map(_can_be_judged, queries))
    found: list[Verdict | None] = [None] * len(queries)
    with Progress("Answers of the model", unit="queries", total=total, shown=progress and total > 0) as bar:
        for number, query in enumerate(queries):
            if _can_be_judged(query):
                is_choice = query.kind == "choice"
                found[number] = _of_choice(model, query, batch_tokens) if is_choice else _of_answer(model, query)
                bar.advance(1)
    return found


def _can_be_judged(query: Query) -> bool:
    return query.kind != "open" and (query.kind is not None or query.truth is not None)


def verdict_lines(queries: Iterable[Query], verdicts: Iterable[Verdict | None]) -> list[str]:
    """The model's accuracy on each kind of query, one line each; none if no query has a verdict."""
    of_kind: dict[str, list[bool]] = {}
    for query, verdict in zip(queries, verdicts, strict=True):
        if verdict is not None:
            of_kind.setdefault(query.kind or "fact", []).append(verdict.correct)
    return [
        f"the model answers {sum(of_kind[kind]):,} of {len(of_kind[kind]):,} {_PLURALS[kind]} right "
        f"({sum(of_kind[kind]) / len(of_kind[kind]):.0%})"
        for kind in KINDS
        if kind in of_kind
    ]


def remark(query: Query, verdict: Verdict | None) -> str:
    """The verdict in words, for people; empty if there is none to give."""
    if query.kind == "open":
        return "open: no right answer"
    if verdict is None:
        return ""
    if query.truth is not None and query.kind != "choice":
        return "right" if verdict.correct else f"wrong; right is {one_line(query.truth, 80)}"
    if query.kind == "choice":
        others = len(query.alternatives)
        than = "the alternative" if others == 1 else f"all {others} alternatives"
        if verdict.correct:
            return f"right: preferred to {than}"
        return f"wrong: the model prefers {one_line(verdict.answer, 80)}"
    return "right" if verdict.correct else f"wrong: the model says {one_line(verdict.answer, 80)}"


def own_answer(model: LanguageModel, query: Query) -> str:
    """The model's greedy answer to a query, without white space at its ends.

    Raises:
        OptionError: The prompt leaves no room in the model's context.
    """
    settings = GenerationSettings(max_new_tokens=max(_SHORTEST, _target_tokens(model, query) + _FURTHER_TOKENS))
    if query.token_ids is None:
        return generate(model, query, settings, query_id=query.query_id).text.strip()
    token_ids, mask = checked_tokens(query, f"query {one_line(query.query_id)}")
    before = token_ids[: int(mask.argmax())].tolist()
    return continuations(model, query.prompt, before, [0], settings)[0].text.strip()


def log_probabilities_of_choice(model: LanguageModel, query: Query, batch_tokens: int = 2048) -> tuple[float, ...]:
    """log P of a choice's right completion and of each alternative, in nats.

    Raises:
        CorpusError: A completion cannot be asked.
    """
    completions = (query.truth or _right_answer(query), *query.alternatives)
    asked = [_with_completion(query, completion, model) for completion in completions]
    tokenized = [tokenize_query(one, model.tokenizer, window_tokens=model.context_tokens) for one in asked]
    return tuple(measured_log_probabilities(model, tokenized, batch_tokens=batch_tokens).tolist())


def preferred(log_probabilities: Sequence[float]) -> int:
    """Which completion of a choice a model prefers: the right one, 0, only if no other is as probable."""
    others = log_probabilities[1:]
    best = max(range(len(others)), key=others.__getitem__)
    return 0 if log_probabilities[0] > others[best] else best + 1


def _of_choice(model: LanguageModel, query: Query, batch_tokens: int) -> Verdict:
    values = log_probabilities_of_choice(model, query, batch_tokens)
    completions = (query.truth or _right_answer(query), *query.alternatives)
    best = preferred(values)
    return Verdict(answer=completions[best].strip(), correct=best == 0, log_probabilities=values)


def _of_answer(model: LanguageModel, query: Query) -> Verdict:
    if query.truth is not None:
        answer = query.completion.strip()
        return Verdict(answer=answer, correct=is_right(answer, query, query.truth))
    answer = own_answer(model, query)
    return Verdict(answer=answer, correct=is_right(answer, query, _right_answer(query)))


def _right_answer(query: Query) -> str:
    """The completion, or the last answer of a conversation."""
    return query.completion if query.messages is None else str(query.messages[-1].get("content", ""))


def _target_tokens(model: LanguageModel, query: Query) -> int:
    if query.token_ids is not None:
        return sum(query.target_mask or ())
    return len(model.tokenizer(_right_answer(query), add_special_tokens=False)["input_ids"])


def _with_completion(query: Query, completion: str, model: LanguageModel) -> Query:
    """The query with another completion, in the same place of the same context."""
    plain = dataclasses.replace(query, kind=None, alternatives=(), truth=None)
    if query.messages is not None:
        last = {**query.messages[-1], "role": "assistant", "content": completion}
        return dataclasses.replace(plain, messages=(*query.messages[:-1], last))
    if query.token_ids is None:
        return dataclasses.replace(plain, completion=completion)
    token_ids, mask = checked_tokens(query, f"query {one_line(query.query_id)}")
    before = token_ids[: int(mask.argmax())].tolist()
    space = query.completion[: len(query.completion) - len(query.completion.lstrip())]
    text = completion if completion[:1].isspace() else space + completion
    others = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    return dataclasses.replace(
        plain, prompt="", completion="", token_ids=(*before, *others),
        target_mask=(False,) * len(before) + (True,) * len(others),
    )  # fmt: skip
