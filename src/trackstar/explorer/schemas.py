"""What the explorer's API takes and gives, as data: the contract of server and browser (docs/explorer-api.json)."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

LONGEST_PROMPT = 32_768
LONGEST_SEARCH = 512
MOST_TOP = 1000
PAGE = 200
SHOWN_CHARACTERS = 20_000
"""A passage is given this long; the rest is fetched in parts."""

JobState = Literal["queued", "running", "done", "failed", "cancelled"]
Side = Literal["proponents", "opponents"]
Sort = Literal["file", "prompt", "relation", "frequency", "score", "rank"]
Spectrum = list[float]


class Asked(BaseModel):
    """A request's body: nothing but its own fields."""

    model_config = ConfigDict(extra="forbid", str_strip_whitespace=False)


class RunSummary(BaseModel):
    """A result file that is open.

    Attributes:
        run: Its number, from 0.
        name: Its file's name.
        query_set: The release's name of the set of queries, of the first line.
        queries: How many lines it has.
        has: Which optional fields any line has: relation, bucket, frequency, model_correct, proponent_correct,
            entailment, gold, opponents, entities.
        mixing: λ and spectra, where the report that `trackstar query --out` writes lies beside the file.
    """

    run: int
    name: str
    query_set: str
    queries: int
    has: list[str]
    mixing: "MixingSummary | None"


class MixingSummary(BaseModel):
    """λ, where it comes from, and the two spectra whose crossing gives it (paper, §4.3).

    Attributes:
        value: λ.
        rule: In words, where it comes from.
        queries: How many queries R_eval is of.
        rank: At which rank the spectra are made equal; 0 where they were not computed.
        evaluation_value: R_eval's singular value there.
        train_value: R_train's singular value there.
        evaluation_spectrum: R_eval's singular values, descending, thinned.
        evaluation_ranks: Their ranks, from 1.
        train_spectrum: R_train's.
        train_ranks: Their ranks.
        damping: Fraction of a block's mean eigenvalue that was added to R.
        damping_rule: In words, where the damping comes from.
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
    """The index that is open.

    Attributes:
        name: Its folder's name.
        candidates: How many training examples it holds.
        dimensions: Of a projected gradient.
        codec: What projected gradients are stored as.
        architecture: The model's class.
        model: Where the model was loaded from, without the folders above it.
        coverage: Which weight matrices the gradients are of.
        second_moment: Where V comes from.
        corpus: The corpus's name, without the folders above it.
        task_queries: Of how many queries the task is that R_eval is taken from; 0 without one.
        methods: What candidates can be ranked by: `TrackStar`, `BM25`, `embeddings`.
        step: The training step that tail-patch makes, in words; null where none can be made, and then `no_step` says
            why.
        no_step: See `step`.
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
    """What is open.

    Attributes:
        version: trackstar's.
        runs: Result files.
        index: The index, or null.
    """

    version: str
    runs: list[RunSummary]
    index: IndexSummary | None


class QueryRow(BaseModel):
    """A line of the sidebar.

    Attributes:
        places: The query's line in each run, from 0; null where a run lacks it.
        example_id: Its name.
        prompt: Its beginning.
        completion: Its beginning.
        relation: The relation's name or template.
        bucket: Its frequency bucket.
        frequency: In how many training examples it is.
        model_correct: Whether the model answers right.
        score: The first proponent's score.
        rank: Of the first proponent that is right, from 1; null where none is, or nothing is known.
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
    """One figure of a run over the queries that match.

    Attributes:
        name: Of the metric, for people.
        explanation: What it is, in a sentence.
        unit: `share` (0 to 1, shown as %), or `number`.
        estimate: Its value; null where no query has what it is made from.
    """

    name: str
    explanation: str
    unit: Literal["share", "number"]
    estimate: Estimate | None


class Facet(BaseModel):
    """A value that queries can be filtered by, and how many of the matching ones have it."""

    value: str
    queries: int


class QueryPage(BaseModel):
    """A page of the sidebar and the metrics over all that match.

    Attributes:
        total: Lines of the run.
        matching: How many match.
        offset: The page's first, from 0.
        items: The page.
        metrics: For each run, its metrics over the matching queries that it has.
        relations: Values of `relation` among those that match everything but the relation's filter.
        buckets: Likewise of `bucket`.
    """

    total: int
    matching: int
    offset: int
    items: list[QueryRow]
    metrics: list[list[Metric]]
    relations: list[Facet]
    buckets: list[Facet]


class Mark(BaseModel):
    """A stretch of a passage that names an entity: characters [start, stop) of the shown text."""

    start: int
    stop: int
    entity: Literal["subject", "object"]


class Passage(BaseModel):
    """A ranked training example.

    Attributes:
        rank: From 1.
        row: Its row in the index; null in a result file.
        example_id: Its name.
        parent_id: The document's name, where it is a window of one.
        score: What it is ranked by.
        text: Its first `SHOWN_CHARACTERS` characters.
        characters: How many it has.
        correct: Whether it states the fact (gold), where that is known.
        entailment: Score of entailment, from 0 to 1, where that is known.
        category: entails, both entities, one entity, partial match or neither; null where the fact has no entities.
        marks: Where entities are named.
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
    """A query of a result file with its passages."""

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
    proponents: list[Passage]
    opponents: list[Passage]


class Text(BaseModel):
    """Part of a long text: characters [start, start + length of text) of `characters`."""

    text: str
    start: int
    characters: int


class GenerateRequest(Asked):
    """What the model is to go on from."""

    prompt: Annotated[str, Field(max_length=LONGEST_PROMPT)]
    max_new_tokens: Annotated[int, Field(ge=1, le=256)] = 16


class AnswerRequest(Asked):
    """What is to be attributed."""

    prompt: Annotated[str, Field(max_length=LONGEST_PROMPT)]
    completion: Annotated[str, Field(min_length=1, max_length=LONGEST_PROMPT)]
    methods: Annotated[list[Annotated[str, Field(max_length=64)]], Field(min_length=1, max_length=8)]
    top: Annotated[int, Field(ge=1, le=MOST_TOP)] = 10


class CandidateRequest(Asked):
    """One candidate of an answer."""

    row: Annotated[int, Field(ge=0)]


class TokensRequest(CandidateRequest):
    """Whose tokens an influence is split over: the candidate's or the query's."""

    over: Literal["candidate", "query"] = "candidate"


class GeneratedToken(BaseModel):
    """Characters [start, stop) of the generated text, and the model's probability of the token."""

    start: int
    stop: int
    probability: float


class Generation(BaseModel):
    """What the model said, token by token."""

    kind: Literal["generation"] = "generation"
    prompt: str
    text: str
    tokens: list[GeneratedToken]


class Ranking(BaseModel):
    """One method's proponents and opponents.

    Attributes:
        method: `TrackStar`, `BM25` or `embeddings`.
        score: What its scores are, for people.
        proponents: The highest.
        opponents: The lowest, lowest first; empty for methods without.
    """

    method: str
    score: str
    proponents: list[Passage]
    opponents: list[Passage]


class Answer(BaseModel):
    """A prompt and completion attributed.

    Attributes:
        key: Names it in other calls; the same for the same request.
        prompt: As asked.
        completion: As asked.
        loss: Of the completion, in nats.
        probability: The model's, of the completion after the prompt.
        top: How many candidates each ranking was asked to give.
        rankings: One a method, in the order asked for.
        mixing: How R was made.
        notes: What a reader should know: a prompt that was cut to the model's window, fields that cannot be shown.
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
    """Characters [start, stop) of a text and the influence of their token; start = stop for a special token."""

    start: int
    stop: int
    influence: float


class TokenSplit(BaseModel):
    """A candidate's influence split over tokens; the shares sum to it.

    Attributes:
        row: The candidate's.
        over: Whose tokens.
        text: The text that the shares are of.
        influence: The influence as ranked.
        total: The shares' sum; it differs from the influence by the store's rounding.
        shares: In the order of the tokens.
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
    """What has been found out about an answer's candidates so far, so that a link shows it again."""

    splits: list[TokenSplit]
    effects: list[Effect]


class Job(BaseModel):
    """Work that goes on.

    Attributes:
        job: Its number.
        title: What is being done now.
        state: queued, running, done, failed or cancelled.
        done: How much of the present stage is done.
        total: Of how much; null where that is not known.
        unit: Of both, in the plural.
        seconds: How long it has run.
        error: What went wrong, in one line.
        result: What it gave.
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
        row: Its row.
        influence: Eq. 1's value.
        overlap: Its BM25 score on the query.
        shown: Whether a ranking shows it.
        text: Its beginning.
    """

    row: int
    influence: float
    overlap: float
    shown: bool
    text: str


class Insight(BaseModel):
    """All candidates of an answer at a glance.

    Attributes:
        candidates: How many there are.
        edges: Of the histogram of influences, one more than `counts`.
        counts: Candidates in each bin.
        shown: Influences of the shown proponents and opponents.
        mean: Of the influences.
        deviation: Standard deviation of the influences.
        points: The shown candidates and a uniform sample of the others.
        correlation: Spearman's, of influence and overlap over all candidates; null without overlap.
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
        value: The value; empty where a record lacks the field.
        candidates: How many of the top ones have it.
        influence: Their influences' sum.
        share: Of the top ones' positive influence.
        in_corpus: Share of the whole corpus that has the value, where that is known.
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
