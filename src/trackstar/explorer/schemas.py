"""Responses of the explorer's API about results and candidates; `question_schemas.py` has those of
live questions. Both are the contract of server and browser (docs/explorer-api.json).
"""

from typing import Literal

from pydantic import BaseModel

from trackstar.choices import Kind

LONGEST_SEARCH = 512
PAGE = 200
SHOWN_CHARACTERS = 20_000
"""Most characters of a candidate's text in a response; the rest is fetched in parts."""

Method = Literal["TrackStar", "BM25", "embeddings"]
Side = Literal["proponents", "opponents"]
Sort = Literal["file", "prompt", "relation", "frequency", "score", "rank"]

Spectrum = list[float]


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
            proponent_correct, entailment, gold, opponents, entities, kind, alternatives,
            model_answer, groundtruth, generations, confidence, stated.
        kinds: Kinds of questions that at least one line has.
        mixing: λ and spectra from the report beside the file; null without a report.
        changed: Whether the file has changed on disk since it was opened; what is shown is from
            before.
    """

    run: int
    name: str
    query_set: str
    queries: int
    has: list[str]
    kinds: list[Kind]
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
        kinds: Values of `kind` among the queries that match all other filters.
    """

    total: int
    matching: int
    offset: int
    items: list[QueryRow]
    metrics: list[list[Metric]]
    relations: list[Facet]
    buckets: list[Facet]
    kinds: list[Facet]


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
    """A query of a result file with its candidates; null or empty where the line has no field.

    Attributes:
        run: The file's number, from 0.
        place: The query's line, from 0.
        example_id: The query's name.
        query_set: The set of queries that it belongs to.
        prompt: The prompt.
        separator: What stands between prompt and completion in the text that was asked.
        completion: The completion that the ranking explains.
        relation: The relation's name or template.
        bucket: The fact's frequency bucket.
        frequency: Number of training examples that contain the fact.
        kind: The kind of question: a fact, a choice, a free answer, or one without a right answer.
        alternatives: The other completions of a choice, at most 20.
        model_answer: The model's own answer; of a choice, the completion that it prefers.
        model_correct: Whether the model answers correctly.
        groundtruth: The true answer; in most files only where `completion` is another.
        generations: The first 64 sampled answers of the model.
        sampled: Number of all sampled answers.
        confidence: Share of the sampled answers that are right, from 0 to 1.
        stated: Whether a sentence of the corpus states the fact.
        subject: Names of the fact's subject, aliases included.
        object: Names of the fact's object, aliases included.
        proponents: The most positive candidates.
        opponents: The most negative candidates.
    """

    run: int
    place: int
    example_id: str
    query_set: str
    prompt: str
    separator: str
    completion: str
    relation: str | None
    bucket: str | None
    frequency: int | None
    kind: Kind | None
    alternatives: list[str]
    model_answer: str | None
    model_correct: bool | None
    groundtruth: str | None
    generations: list[str]
    sampled: int
    confidence: float | None
    stated: bool | None
    subject: list[str]
    object: list[str]
    proponents: list[Candidate]
    opponents: list[Candidate]


class Text(BaseModel):
    """Part of a text of `characters` characters, beginning at character `start`."""

    text: str
    start: int
    characters: int
