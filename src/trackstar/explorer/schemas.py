"""Requests and responses of the explorer's API, the contract of server and browser
(docs/explorer-api.json).
"""

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

LONGEST_PROMPT = 32_768
LONGEST_SEARCH = 512
MOST_TOP = 1000
PAGE = 200
SHOWN_CHARACTERS = 20_000
"""Most characters of a candidate's text in a response; the rest is fetched in parts."""

Method = Literal["TrackStar", "BM25", "embeddings"]
JobState = Literal["queued", "running", "done", "failed", "cancelled"]
Side = Literal["proponents", "opponents"]
Sort = Literal["file", "prompt", "relation", "frequency", "score", "rank"]
Spectrum = list[float]


def _number(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError("Input should be a valid integer")
    return value


WHOLE_NUMBER = BeforeValidator(_number)
"""Takes a whole number of JSON, 5 or 5.0, but not "5" or true; comes last, so that bounds are described."""


class RequestBody(BaseModel):
    """A request's body; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")


class Error(BaseModel):
    """Every response other than success.

    Attributes:
        detail: What was found, what was expected and what to do, in one line.
    """

    detail: str


class RunSummary(BaseModel):
    """An open result file.

    Attributes:
        run: The file's number, from 0.
        name: The file's name.
        query_set: The release's name for the set of queries, from the first line.
        queries: Number of lines.
        has: Optional fields that at least one line has: relation, bucket, frequency, model_correct,
            proponent_correct, entailment, gold, opponents, entities.
        mixing: λ and spectra from the report beside the file; null without a report.
        changed: Whether the file has changed on disk since it was opened; what is shown is from
            before.
    """

    run: int
    name: str
    query_set: str
    queries: int
    has: list[str]
    mixing: "MixingSummary | None"
    changed: bool


class MixingSummary(BaseModel):
    """λ, the rule that chose it, and the two spectra whose crossing gives it (paper, §4.3).

    Attributes:
        value: λ.
        rule: The rule that chose λ, in words.
        queries: Number of queries that R_eval is computed from.
        rank: Rank at which λ makes the spectra equal; 0 if λ was not chosen by the spectra.
        evaluation_value: R_eval's singular value at that rank.
        train_value: R_train's singular value at that rank.
        evaluation_spectrum: R_eval's singular values, descending, thinned for a chart.
        evaluation_ranks: Their ranks, from 1.
        train_spectrum: R_train's singular values, descending, thinned for a chart.
        train_ranks: Their ranks, from 1.
        damping: Ridge added to R_train, as a fraction of its mean eigenvalue per block.
        damping_rule: The rule that chose the damping, in words.
    """

    value: float
    rule: str
    queries: int
    rank: int
    evaluation_value: float
    train_value: float
    evaluation_spectrum: Spectrum
    evaluation_ranks: list[int]
    train_spectrum: Spectrum
    train_ranks: list[int]
    damping: float
    damping_rule: str


class IndexSummary(BaseModel):
    """The open index.

    Attributes:
        name: The index folder's name.
        candidates: Number of training examples in the index.
        dimensions: Dimensions of a projected gradient.
        codec: Number format of the stored rows.
        architecture: The model's class.
        model: The model's name, without the folders above it.
        coverage: The weight matrices whose gradients are indexed.
        second_moment: The source of V.
        corpus: The corpus's name, without the folders above it.
        task_queries: Number of queries in the task that R_eval is computed from; 0 without a task.
        methods: Methods that can rank candidates: `TrackStar`, `BM25`, `embeddings`.
        step: The training step that tail-patch makes, in words; null if none can be made.
        no_step: The reason why no training step can be made; null if one can.
        metadata: Fields of the corpus that proponents can be grouped by.
    """

    name: str
    candidates: int
    dimensions: int
    codec: str
    architecture: str
    model: str
    coverage: str
    second_moment: str
    corpus: str
    task_queries: int
    methods: list[str]
    step: str | None
    no_step: str | None
    metadata: list[str]


class Session(BaseModel):
    """The open result files and index.

    Attributes:
        version: trackstar's version.
        runs: The result files.
        index: The index, or null.
    """

    version: str
    runs: list[RunSummary]
    index: IndexSummary | None


class QueryRow(BaseModel):
    """A query in the sidebar.

    Attributes:
        places: The query's line in each run, from 0; null for a run without the query.
        example_id: The query's name.
        prompt: The prompt's beginning.
        completion: The completion's beginning.
        relation: The relation's name or template.
        bucket: The fact's frequency bucket.
        frequency: Number of training examples that contain the fact.
        model_correct: Whether the model answers correctly.
        score: The first proponent's score.
        rank: Rank of the first correct proponent, from 1; null if none is correct or correctness is
            unknown.
    """

    places: list[int | None]
    example_id: str
    prompt: str
    completion: str
    relation: str | None
    bucket: str | None
    frequency: int | None
    model_correct: bool | None
    score: float | None
    rank: int | None


class Estimate(BaseModel):
    """A mean over queries with its 95% bootstrap interval."""

    mean: float
    low: float
    high: float
    queries: int


class Metric(BaseModel):
    """A metric of a run over the matching queries.

    Attributes:
        name: The metric's name for users.
        explanation: The metric's definition, in a sentence.
        unit: `share` (0 to 1, shown as %), or `number`.
        estimate: The metric's value; null if no query has the fields that it needs.
    """

    name: str
    explanation: str
    unit: Literal["share", "number"]
    estimate: Estimate | None


class Facet(BaseModel):
    """A value to filter by, with the number of matching queries that have it."""

    value: str
    queries: int


class QueryPage(BaseModel):
    """A page of the sidebar, with metrics over all matching queries.

    Attributes:
        total: Number of queries in the run.
        matching: Number of matching queries.
        offset: Number of matching queries before this page.
        items: The page's queries.
        metrics: For each run, its metrics over the matching queries that it has.
        relations: Values of `relation` among the queries that match all other filters.
        buckets: Values of `bucket` among the queries that match all other filters.
    """

    total: int
    matching: int
    offset: int
    items: list[QueryRow]
    metrics: list[list[Metric]]
    relations: list[Facet]
    buckets: list[Facet]


class Mark(BaseModel):
    """Characters [start, stop) of a candidate's shown text, which name an entity."""

    start: int
    stop: int
    entity: Literal["subject", "object"]


class Candidate(BaseModel):
    """A ranked training example.

    Attributes:
        rank: The candidate's rank, from 1.
        row: Row in the index; null in a result file.
        example_id: The training example's name.
        parent_id: The document's name, if the example is a window of a document.
        score: The score that ranks it.
        text: The first 20,000 characters of its text.
        characters: Number of characters of the whole text.
        correct: Whether it states the fact (gold); null if unknown.
        entailment: Entailment score, from 0 to 1; null if unknown.
        category: entails, both entities, one entity, partial match or neither; null for a fact
            without entities.
        marks: Parts of the text that name entities.
        metadata: Fields of its record in the corpus, as text.
    """

    rank: int
    row: int | None
    example_id: str
    parent_id: str | None
    score: float
    text: str
    characters: int
    correct: bool | None
    entailment: float | None
    category: str | None
    marks: list[Mark]
    metadata: dict[str, str]


class QueryRecord(BaseModel):
    """A query of a result file with its candidates."""

    run: int
    place: int
    example_id: str
    query_set: str
    prompt: str
    completion: str
    relation: str | None
    bucket: str | None
    frequency: int | None
    model_correct: bool | None
    subject: list[str]
    object: list[str]
    groundtruth: str | None
    proponents: list[Candidate]
    opponents: list[Candidate]


class Text(BaseModel):
    """Part of a text of `characters` characters, beginning at character `start`."""

    text: str
    start: int
    characters: int


class GenerateRequest(RequestBody):
    """A prompt for the model to continue."""

    prompt: Annotated[str, Field(max_length=LONGEST_PROMPT)]
    max_new_tokens: Annotated[int, Field(ge=1, le=256), WHOLE_NUMBER] = 16


class AnswerRequest(RequestBody):
    """A completion to attribute."""

    prompt: Annotated[str, Field(max_length=LONGEST_PROMPT)]
    completion: Annotated[str, Field(min_length=1, max_length=LONGEST_PROMPT)]
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
    """Characters [start, stop) of the generated text, and the model's probability of the token."""

    start: int
    stop: int
    probability: float


class Generation(BaseModel):
    """The model's continuation of a prompt, token by token."""

    kind: Literal["generation"] = "generation"
    prompt: str
    text: str
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
