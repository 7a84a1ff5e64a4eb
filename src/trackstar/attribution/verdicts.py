"""Whether a model answers a query right, by the kind of its task (paper, Table A.7 and Appendix A.5).

A fact or a generation is right where the model's own greedy answer begins with the right one. A choice is
right where the completion is more probable than every alternative. An open query has no right answer.
"""

import dataclasses
from collections.abc import Iterable, Sequence

from trackstar.choices import KINDS
from trackstar.corpus import Query, prompt_of, prompt_tokens, query_with_texts, tokenize_query
from trackstar.corpus.kinds import is_right
from trackstar.corpus.queries import checked_tokens
from trackstar.model.completion_probabilities import measured_log_probabilities
from trackstar.model.generation import continuations
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

    A query of tokens with a `truth` is the model's own answer, as of `Generation.query`, and is compared
    with that; any other is answered greedily.

    Args:
        model: The model.
        queries: The queries, as texts or messages if their alternatives are to be asked in a chat template.
        batch_tokens: Most tokens per batch, padding included.
        progress: Whether progress is shown.

    Raises:
        OptionError: A prompt has no token.
        CorpusError: A choice's alternative cannot be asked, or the other names of an answer are no names.
    """
    total = sum(map(_can_be_judged, queries))
    found: list[Verdict | None] = [None] * len(queries)
    with Progress("Answers of the model", unit="queries", total=total, shown=progress and total > 0) as bar:
        for number, given in enumerate(queries):
            if _can_be_judged(given):
                query = given if given.messages is not None else query_with_texts(given, model.tokenizer)
                is_choice = query.kind == "choice"
                found[number] = _of_choice(model, query, batch_tokens) if is_choice else _of_answer(model, query)
                bar.advance(1)
    return found


def _can_be_judged(query: Query) -> bool:
    if query.kind == "open" or query.truth == "":
        return False
    return len(_options(query)) > 1 if query.kind == "choice" else query.kind is not None or query.truth is not None


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
    said = f'"{one_line(verdict.answer, 80)}"'
    if query.kind == "choice":
        others = len(_options(query)) - 1
        than = "the alternative" if others == 1 else f"all {others} alternatives"
        return (
            f"right: the right completion is preferred to {than}"
            if verdict.correct
            else f"wrong: the model prefers {said}"
        )
    if verdict.correct:
        return "right"
    if query.truth:
        return f'wrong: the model says {said}; right is "{one_line(query.truth, 80)}"'
    return f"wrong: the model says {said}"


def own_answer(model: LanguageModel, query: Query, *, max_new_tokens: int | None = None) -> str:
    """The model's greedy answer to a query, without white space at its ends.

    A prompt that leaves no room for it in the model's context loses its beginning.

    Args:
        model: The model.
        query: The query; its completion is not read.
        max_new_tokens: Most tokens of the answer; None is some more than the right answer has.
    """
    wanted = max_new_tokens or max(_SHORTEST, _target_tokens(model, query) + _FURTHER_TOKENS)
    settings = GenerationSettings(max_new_tokens=max(1, min(wanted, model.context_tokens // 2)))
    if query.token_ids is None:
        text = prompt_of(query, model.tokenizer)
        before = prompt_tokens(text, model.tokenizer, special_tokens=query.messages is None)
    else:
        token_ids, mask = checked_tokens(query, f"query {one_line(query.query_id)}")
        text, before = query.prompt, token_ids[: int(mask.argmax())].tolist()
    room = model.context_tokens - settings.max_new_tokens
    if len(before) > room:
        before = [*before[:1], *before[len(before) - room + 1 :]]
    return continuations(model, text, before, [0], settings)[0].text.strip()


def log_probabilities_of_choice(model: LanguageModel, query: Query, batch_tokens: int = 2048) -> tuple[float, ...]:
    """log P of a choice's right completion and of each alternative, in nats.

    Raises:
        CorpusError: A completion cannot be asked.
    """
    asked = [_with_completion(query, completion, model) for completion in _options(query)]
    tokenized = [tokenize_query(one, model.tokenizer, window_tokens=model.context_tokens) for one in asked]
    return tuple(measured_log_probabilities(model, tokenized, batch_tokens=batch_tokens).tolist())


def preferred(log_probabilities: Sequence[float]) -> int:
    """Which completion of a choice a model prefers: the right one, 0, only if no other is as probable."""
    others = log_probabilities[1:]
    best = max(range(len(others)), key=others.__getitem__)
    return 0 if log_probabilities[0] > others[best] else best + 1


def _of_choice(model: LanguageModel, query: Query, batch_tokens: int) -> Verdict:
    values = log_probabilities_of_choice(model, query, batch_tokens)
    best = preferred(values)
    return Verdict(answer=_options(query)[best].strip(), correct=best == 0, log_probabilities=values)


def _options(query: Query) -> tuple[str, ...]:
    """The completions of a choice, the right one first.

    A completion that is not the right one is an option, too, unless it is the model's own free answer.
    """
    right = query.truth or _right_answer(query)
    is_option = bool(query.truth) and query.token_ids is None and query.completion.strip()
    others = dict.fromkeys((*query.alternatives, *((query.completion,) if is_option else ())))
    return (right, *(one for one in others if one != right and not (query.truth and one.strip() == right.strip())))


def _of_answer(model: LanguageModel, query: Query) -> Verdict:
    is_own = query.truth is not None and query.token_ids is not None
    answer = query.completion.strip() if is_own else own_answer(model, query)
    return Verdict(answer=answer, correct=is_right(answer, query, query.truth or _right_answer(query)))


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
