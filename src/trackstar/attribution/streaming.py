"""Queries answered without any index: the corpus goes through the model once, against all queries at the same time.

R_train comes from a sample of the corpus. Nothing is stored of a candidate but what is among the first k of some query;
that and the place reached are kept beside the results now and then, so that an interrupted run goes on from there.
"""

import dataclasses
import hashlib
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from trackstar.attribution.question import Asked, QuestionEntry, StreamEntry
from trackstar.attribution.results import QueryReport, QueryResult, Ranked, replace_text
from trackstar.choices import Output
from trackstar.corpus import Corpus, Query, TokenizedExample, open_corpus, tokenize_examples, tokenize_query
from trackstar.curvature.autocorrelation import Autocorrelation, check_autocorrelation_size
from trackstar.curvature.mixing import spectrum_of_autocorrelation
from trackstar.curvature.task import choose_mixing, mixed_correction
from trackstar.errors import CorpusError, OptionError
from trackstar.gradients.projector import GradientProjector, projected
from trackstar.gradients.second_moment import SecondMoment
from trackstar.indexing.groups import CorpusPosition, tokenized_windows
from trackstar.indexing.provenance import make_manifest
from trackstar.indexing.settings import check_positive, chosen_second_moment, chosen_windows
from trackstar.model.language_model import LanguageModel, load_model
from trackstar.progress import Progress
from trackstar.retrieval.reranking import influences
from trackstar.retrieval.scoring import unit_queries
from trackstar.retrieval.top_candidates import best_of
from trackstar.store import Manifest, WindowsEntry, tensors_digest

_EXAMPLES_AT_ONCE = 256
_KEEP_EVERY = 60.0


def stream_queries(
    model: LanguageModel | str | Path,
    data: object,
    queries: Sequence[Query],
    *,
    k: int = 10,
    mixing: float | None = None,
    damping: float | None = None,
    task: Sequence[Query] | None = None,
    text_field: str = "text",
    id_field: str | None = None,
    limit: int | None = None,
    window_tokens: int | None = None,
    overlap: int = 1,
    second_moment: str | Path | SecondMoment = "auto",
    second_moment_kind: Literal["factored", "elementwise"] = "factored",
    second_moment_examples: int = 256,
    whitening_examples: int = 4096,
    side: int = 64,
    seed: int = 0,
    output: Output = "loss",
    dtype: str = "float32",
    device: str = "cpu",
    batch_tokens: int = 2048,
    kept: str | Path | None = None,
    progress: bool = True,
) -> QueryReport:
    """Rank a corpus's examples by their influence on each query (Eq. 1-3), exactly and without an index.

    Args:
        model: A loaded model, or where to load one from.
        data: The corpus; see `open_corpus`.
        queries: What to explain.
        k: How many proponents and opponents to give.
        mixing: See `answer_queries`.
        damping: See `answer_queries`.
        task: See `answer_queries`.
        text_field: The field that holds the text.
        id_field: The field that names an example; None finds it.
        limit: Most records to read.
        window_tokens: See `build_index`.
        overlap: See `build_index`.
        second_moment: V; see `build_index`.
        second_moment_kind: See `build_index`.
        second_moment_examples: See `build_index`.
        whitening_examples: How many records R_train comes from, drawn with `seed`; their gradients are computed twice.
        side: √d, rows and columns of a block of φ.
        seed: Of the projections and samples.
        output: What is differentiated.
        dtype: Of the gradients' computation.
        device: Where gradients are computed.
        batch_tokens: Most tokens of a batch, padding included.
        kept: A file that what has been found is kept in, so that the same call goes on from there; it stays, also at
            the end, for the caller to remove once the results are safe. None keeps nothing.
        progress: Whether progress is shown where stderr is a terminal.

    Raises:
        TrackstarError: Something cannot be read, used or written; see `trackstar.errors`.
    """
    if not queries:
        raise OptionError("queries: found none, expected one or more")
    for option, value in (
        ("--top", k),
        ("--side", side),
        ("--whitening-examples", whitening_examples),
        ("--second-moment-examples", second_moment_examples),
    ):
        check_positive(option, value)
    if not isinstance(model, LanguageModel):
        model = load_model(model, dtype=dtype, device=device)
    check_autocorrelation_size(len(model.blocks), side, model.device)
    corpus = open_corpus(data, text_field=text_field, id_field=id_field, limit=limit)
    windows = chosen_windows(model, window_tokens=window_tokens, overlap=overlap, batch_tokens=batch_tokens)
    with Progress("R_train", unit="examples", shown=progress) as bar:
        moment = chosen_second_moment(
            second_moment, model, corpus, windows, kind=second_moment_kind, examples=second_moment_examples, seed=seed,
            batch_tokens=batch_tokens, out=None, note=bar.note,
        )  # fmt: skip
        with GradientProjector(
            model, moment, seed=seed, side=side, batch_tokens=batch_tokens, note=bar.note, output=output
        ) as projector:
            sample = tokenize_examples(
                corpus.sample(whitening_examples, seed), model.tokenizer, window_tokens=windows.tokens, overlap=overlap
            )
            r_train, examples = _autocorrelation(projector, model, side, itertools.chain.from_iterable(sample), bar)
            asked, losses = projected(projector, _tokenized(queries, model))
            about = asked if task is None else projected(projector, _tokenized(task, model))[0]
    if not examples:
        raise CorpusError(f"{corpus.name}: no record of it has a token to score, expected texts of two tokens or more")
    blocks = len(model.blocks)
    chosen = choose_mixing(about, lambda: spectrum_of_autocorrelation(r_train), blocks=blocks, given=mixing)
    names = [block.name for block in model.blocks]
    correction = mixed_correction(r_train, examples, about, chosen, damping=damping, names=names, made_of="")
    vectors = unit_queries(asked, correction.whitening)
    made_with = make_manifest(
        model, corpus, windows, moment, seed=seed, side=side, codec="float32", shard_examples=1, output=output
    )
    found = _Found(k, None if kept is None else Path(kept), _digest(vectors, made_with, k))
    with (
        Progress("Streaming", unit="examples", shown=progress) as bar,
        GradientProjector(
            model, moment, seed=seed, side=side, batch_tokens=batch_tokens, note=bar.note, output=output
        ) as projector,
    ):
        bar.advance(found.rows)
        for part, position in _parts(corpus, model, found.position, windows):
            phi, _ = projected(projector, part, bar.advance)
            found.add(influences(correction, vectors, phi), part, position)
        found.keep()
    results = tuple(
        QueryResult(query=query, loss=float(losses[number]), proponents=proponents, opponents=opponents)
        for number, query in enumerate(queries)
        for proponents, opponents in [found.ranking(number)]
    )
    stream = StreamEntry(
        second_moment=_how(second_moment),
        second_moment_examples=second_moment_examples,
        whitening_examples=whitening_examples,
        r_train_examples=examples,
        r_train=tensors_digest({"autocorrelation": r_train}),
    )
    return QueryReport(
        results=results,
        mixing=correction.mixing,
        damping=correction.damping,
        damping_rule=correction.damping_rule,
        candidates=found.rows,
        codec="none",
        reranked=found.rows,
        recomputed=found.rows,
        index=corpus.name,
        model=model.source,
        coverage=str(model.coverage),
        second_moment=f"{moment.kind}, {moment.source}",
        asked=Asked(
            question=QuestionEntry.of(task, top=k, mixing=mixing, damping=damping, batch_tokens=batch_tokens),
            made_with=made_with,
            index=None,
            stream=stream,
            device=str(model.device),
        ),
    )


def _tokenized(queries: Sequence[Query], model: LanguageModel) -> list[TokenizedExample]:
    return [tokenize_query(query, model.tokenizer, window_tokens=model.context_tokens) for query in queries]


def _autocorrelation(
    projector: GradientProjector, model: LanguageModel, side: int, examples: Iterator[TokenizedExample], bar: Progress
) -> tuple[Float[Tensor, "blocks dim dim"], int]:
    """R_train of the examples, and how many they are."""
    sums = Autocorrelation(len(model.blocks), side**2, device=model.device)
    while part := list(itertools.islice(examples, _EXAMPLES_AT_ONCE)):
        sums.add(projected(projector, part, bar.advance)[0])
    return (sums.mean().cpu() if sums.examples else torch.zeros(0, side**2, side**2)), sums.examples


def _parts(
    corpus: Corpus, model: LanguageModel, start: CorpusPosition, windows: WindowsEntry
) -> Iterator[tuple[list[TokenizedExample], CorpusPosition]]:
    """Some hundred windows at a time, with the place after them."""
    held: list[TokenizedExample] = []
    position = start
    for window, position in tokenized_windows(
        corpus, model, start, window_tokens=windows.tokens, overlap=windows.overlap
    ):
        if window is not None:
            held.append(window)
        if len(held) == _EXAMPLES_AT_ONCE:
            yield held, position
            held = []
    if held:
        yield held, position


def _how(second_moment: str | Path | SecondMoment) -> Literal["auto", "estimate", "none", "given"]:
    """How V was asked for."""
    return second_moment if second_moment in ("auto", "estimate", "none") else "given"  # pyright: ignore[reportReturnType]


def _digest(vectors: Tensor, made_with: Manifest, k: int) -> str:
    """Names a question: two runs of the same go on from one another."""
    of = f"{made_with.corpora[0].digest} {made_with.model.digest} {k}"
    parts = [vectors.contiguous().numpy().tobytes(), of.encode()]
    return hashlib.blake2b(b"\0".join(parts), digest_size=16).hexdigest()


class _Found:
    """The first k and last k so far, with their texts, and the place reached; kept in a file now and then."""

    def __init__(self, k: int, file: Path | None, digest: str) -> None:
        self._k = k
        self._file = file
        self._digest = digest
        self._best: tuple[Tensor, Tensor] | None = None
        self._worst: tuple[Tensor, Tensor] | None = None
        self._texts: dict[int, tuple[str, str, str]] = {}
        self._saved = time.monotonic()
        self.rows = 0
        self.position = CorpusPosition(record=0, window=0, skipped=0)
        self._take_up()

    def add(
        self, scores: Float[Tensor, "queries rows"], examples: Sequence[TokenizedExample], position: CorpusPosition
    ) -> None:
        """Take in the next candidates."""
        rows = torch.arange(self.rows, self.rows + len(examples))
        self._best = best_of(scores, rows, self._k, before=self._best)
        self._worst = best_of(-scores, rows, self._k, before=self._worst)
        for row, example in zip(rows.tolist(), examples, strict=True):
            self._texts[row] = (example.example_id, example.parent_id, example.text)
        shown = {row for part in (self._best, self._worst) for row in part[1].flatten().tolist()}
        self._texts = {row: self._texts[row] for row in self._texts if row in shown}
        self.rows += len(examples)
        self.position = position
        if time.monotonic() - self._saved > _KEEP_EVERY:
            self.keep()

    def ranking(self, query: int) -> tuple[tuple[Ranked, ...], tuple[Ranked, ...]]:
        """A query's proponents and opponents."""
        assert self._best is not None, "a corpus has at least one example"
        assert self._worst is not None, "a corpus has at least one example"
        return self._ranked(self._best, query, 1.0), self._ranked(self._worst, query, -1.0)

    def _ranked(self, part: tuple[Tensor, Tensor], query: int, sign: float) -> tuple[Ranked, ...]:
        ranked = []
        for score, row in zip(part[0][query].tolist(), part[1][query].tolist(), strict=True):
            name, parent, text = self._texts[row]
            ranked.append(Ranked(row=row, example_id=name, parent_id=parent, influence=sign * score, text=text))
        return tuple(ranked)

    def keep(self) -> None:
        """Write the file, where there is to be one."""
        if self._file is None:
            return
        assert self._best is not None, "kept after something was added"
        assert self._worst is not None, "kept after something was added"
        content = {
            "question": self._digest,
            "rows": self.rows,
            "position": dataclasses.asdict(self.position),
            "best": [part.tolist() for part in self._best],
            "worst": [part.tolist() for part in self._worst],
            "texts": {str(row): said for row, said in self._texts.items()},
        }
        replace_text(self._file, json.dumps(content))
        self._saved = time.monotonic()

    def _take_up(self) -> None:
        if self._file is None or not self._file.exists():
            return
        try:
            content = json.loads(self._file.read_text(encoding="utf-8"))
            if content["question"] != self._digest:
                return
            best, worst = (
                (torch.tensor(content[name][0]), torch.tensor(content[name][1])) for name in ("best", "worst")
            )
            texts = {int(row): (said[0], said[1], said[2]) for row, said in content["texts"].items()}
            position = CorpusPosition(**content["position"])
            rows = int(content["rows"])
        except (ValueError, LookupError, TypeError, OSError):
            return  # not whole, or not ours: begin anew
        self._best, self._worst, self._texts, self.position, self.rows = best, worst, texts, position, rows
