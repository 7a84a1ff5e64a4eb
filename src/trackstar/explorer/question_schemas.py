"""Requests and responses of live questions in the explorer's API: generated text, answers, token
splits, effects, jobs and overviews.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from trackstar.choices import Join, Stop
from trackstar.explorer.schemas import Candidate, Method, MixingSummary

LONGEST_PROMPT = 32_768
MOST_TOP = 1000
JobState = Literal["queued", "running", "done", "failed", "cancelled"]


def _number(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError("Input should be a valid integer")
    return value


WHOLE_NUMBER = BeforeValidator(_number)
"""Takes a whole number of JSON, 5 or 5.0, but not "5" or true; comes last, so that bounds are described."""
TokenId = Annotated[int, Field(ge=0, lt=2**31), WHOLE_NUMBER]


class RequestBody(BaseModel):
    """A request's body; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")


class GenerateRequest(RequestBody):
    """A prompt for the model to continue."""

    prompt: Annotated[str, Field(max_length=LONGEST_PROMPT)]
    max_new_tokens: Annotated[int, Field(ge=1, le=256), WHOLE_NUMBER] = 16
    temperature: Annotated[float, Field(ge=0, le=100, strict=True)] = 0.0
    seed: Annotated[int, Field(ge=0, lt=2**53), WHOLE_NUMBER] = 0
    stop: Stop = "line"
    chat: Annotated[bool, Field(strict=True)] = False


class AskedTokens(RequestBody):
    """Tokens to attribute as they are, such as those of a generation.

    Attributes:
        token_ids: The tokens, special tokens included.
        first: The first one that is explained; it and all after it are the completion.
    """

    token_ids: Annotated[list[TokenId], Field(min_length=2, max_length=LONGEST_PROMPT)]
    first: Annotated[int, Field(ge=1, lt=LONGEST_PROMPT), WHOLE_NUMBER]


class AnswerRequest(RequestBody):
    """A completion to attribute.

    Attributes:
        prompt: The prompt; for `tokens`, its text, for people.
        completion: The completion; for `tokens`, its text, for people.
        join: How the two are joined: with a space where writing has one, always, or never.
        tokens: If given, exactly these tokens are asked.
        methods: The methods that rank training examples.
        top: Number of candidates per ranking.
    """

    prompt: Annotated[str, Field(max_length=LONGEST_PROMPT)]
    completion: Annotated[str, Field(min_length=1, max_length=LONGEST_PROMPT)]
    join: Join = "auto"
    tokens: AskedTokens | None = None
    methods: Annotated[list[Method], Field(min_length=1, json_schema_extra={"uniqueItems": True})]
    top: Annotated[int, Field(ge=1, le=MOST_TOP), WHOLE_NUMBER] = 10

    @field_validator("methods")
    @classmethod
    def _each_once(cls, methods: list[Method]) -> list[Method]:
        if len(set(methods)) != len(methods):
            raise ValueError(f"expected each method once, found {', '.join(methods)}")
        return methods


class CandidateRequest(RequestBody):
    """One candidate of an answer."""

    row: Annotated[int, Field(ge=0), WHOLE_NUMBER]


class TokensRequest(CandidateRequest):
    """One candidate of an answer, and the text whose tokens its influence is split over."""

    over: Literal["candidate", "query"] = "candidate"


class GeneratedToken(BaseModel):
    """A token, its characters [start, stop) in the generated text, and the model's probability of it."""

    token_id: int
    start: int
    stop: int
    probability: float


class Generation(BaseModel):
    """The model's continuation of a prompt, token by token.

    Attributes:
        prompt: The prompt as the model read it, in the chat template if one was used.
        text: The continuation, with the white space at its ends.
        prompt_ids: The tokens of the prompt, special tokens included.
        tokens: The tokens of the continuation.
    """

    kind: Literal["generation"] = "generation"
    prompt: str
    text: str
    prompt_ids: list[int]
    tokens: list[GeneratedToken]


class Ranking(BaseModel):
    """One method's proponents and opponents.

    Attributes:
        method: `TrackStar`, `BM25` or `embeddings`.
        score: A description of its scores for users.
        proponents: Candidates with the highest positive scores, highest first.
        opponents: Candidates with the lowest negative scores, lowest first; only TrackStar has
            opponents.
    """

    method: str
    score: str
    proponents: list[Candidate]
    opponents: list[Candidate]


class Answer(BaseModel):
    """The rankings of training examples for a prompt and a completion.

    Attributes:
        key: Identifies the answer in other requests; equal requests have equal keys.
        prompt: The request's prompt.
        completion: The request's completion.
        separator: What stands between the two in the text that was asked: a space or nothing.
        loss: The completion's loss, in nats.
        probability: The model's probability of the completion after the prompt.
        top: Number of candidates requested per ranking.
        rankings: One per method, in the request's order.
        mixing: λ and damping of R.
        notes: Notes for the user, such as a prompt that was cut to the model's window.
    """

    kind: Literal["answer"] = "answer"
    key: str
    prompt: str
    completion: str
    separator: str
    loss: float
    probability: float
    top: int
    rankings: list[Ranking]
    mixing: MixingSummary
    notes: list[str]


class Share(BaseModel):
    """Characters [start, stop) of a text with their token's influence; start = stop for a special token."""

    start: int
    stop: int
    influence: float


class TokenSplit(BaseModel):
    """A candidate's influence split over tokens; the shares sum to it.

    Attributes:
        row: The candidate's row.
        over: The text that is split: the candidate or the query.
        text: That text.
        influence: The influence that ranks the candidate.
        total: The shares' sum; it differs from the influence by the store's rounding.
        shares: One share per token, in order.
    """

    kind: Literal["tokens"] = "tokens"
    row: int
    over: Literal["candidate", "query"]
    text: str
    influence: float
    total: float
    shares: list[Share]


class Effect(BaseModel):
    """Tail-patch: the completion's probability before and after one training step on the candidate."""

    kind: Literal["effect"] = "effect"
    row: int
    before: float
    after: float
    step: str


class Details(BaseModel):
    """Token splits and measured effects of an answer so far, so that a link to the answer shows them."""

    splits: list[TokenSplit]
    effects: list[Effect]


class Job(BaseModel):
    """A computation in the queue, running or ended.

    Attributes:
        job: The job's number.
        title: The current stage.
        state: queued, running, done, failed or cancelled.
        done: Units done in the current stage.
        total: Units in the current stage; null if unknown.
        unit: The unit, in the plural.
        seconds: Running time so far.
        error: The error, in one line; null if there is none.
        result: The result; null until the job is done.
    """

    job: int
    title: str
    state: JobState
    done: int
    total: int | None
    unit: str
    seconds: float
    error: str | None
    result: Annotated[Generation | Answer | TokenSplit | Effect, Field(discriminator="kind")] | None


class Point(BaseModel):
    """A candidate in the scatter: influence against lexical overlap.

    Attributes:
        row: The candidate's row.
        influence: Its influence (Eq. 1).
        overlap: Its BM25 score for the query.
        shown: Whether a ranking shows it.
        text: The beginning of its text.
    """

    row: int
    influence: float
    overlap: float
    shown: bool
    text: str


class Insight(BaseModel):
    """The influences of all candidates of an answer.

    Attributes:
        candidates: Number of candidates.
        edges: Edges of the histogram's bins, one more than `counts`.
        counts: Number of candidates in each bin.
        shown: Influences of the shown proponents and opponents.
        mean: Mean of the influences.
        deviation: Standard deviation of the influences.
        points: The shown candidates and a uniform sample of the others.
        correlation: Spearman's correlation of influence and overlap over all candidates; null if
            undefined.
    """

    candidates: int
    edges: list[float]
    counts: list[int]
    shown: list[float]
    mean: float
    deviation: float
    points: list[Point]
    correlation: float | None


class Group(BaseModel):
    """Proponents that share a value of a metadata field.

    Attributes:
        value: The value; empty for records without the field.
        candidates: Number of top candidates with the value.
        influence: The sum of their scores.
        share: Their share of the top candidates' positive scores.
        in_corpus: Share of the whole corpus with the value; null if unknown.
    """

    value: str
    candidates: int
    influence: float
    share: float
    in_corpus: float | None


class Groups(BaseModel):
    """The top candidates of a method, grouped by a field of the corpus."""

    field: str
    method: str
    top: int
    groups: list[Group]
