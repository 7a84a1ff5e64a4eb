"""The model's own answers to facts, sampled, and how sure it is of the right one.

The lines are those of the public release's facts: the fact's own fields, `8b_generations` (the sampled
answers) and `8b_confidence` (the share of them that match the answer or one of its aliases), whatever
the size of the model.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from trackstar.corpus import Query, prompt_of
from trackstar.corpus.digests import digest_of_json
from trackstar.corpus.kinds import is_right
from trackstar.errors import OptionError
from trackstar.model.generation import check_samples, generate_samples
from trackstar.model.generation_settings import GenerationSettings
from trackstar.model.language_model import LanguageModel
from trackstar.progress import Progress
from trackstar.store.files.outputs import (
    Input,
    check_can_write,
    check_replaceable,
    output_target,
    refuse_inputs,
    replace_bytes,
)

GENERATIONS, CONFIDENCE = "8b_generations", "8b_confidence"
SAMPLES = 8


def sample_answers(
    model: LanguageModel,
    queries: Sequence[Query],
    out: str | os.PathLike[str],
    settings: GenerationSettings | None = None,
    *,
    samples: int = SAMPLES,
    read: Sequence[Input] = (),
    force: bool = False,
    progress: bool = True,
) -> Path:
    """Sample a model's answers to facts, and write them with the facts as JSON lines.

    Answers so far are kept in `NAME.unfinished` beside the file, from which the same call resumes.

    Args:
        model: The model.
        queries: The facts; a query without a completion has no confidence.
        out: The file.
        settings: How to generate; None is with temperature 1 up to 16 tokens or the end of the line.
        samples: Number of answers to each fact.
        read: What the run reads, none of which may be replaced.
        force: Whether to replace an existing file.
        progress: Whether progress is shown.

    Returns:
        The file.

    Raises:
        OptionError: A setting or the file cannot be used, or several samples are to be equal.
        TrackstarError: A prompt cannot be read, or the file cannot be written.
    """
    settings = settings or GenerationSettings(temperature=1.0)
    check_samples(samples)
    if samples > 1 and settings.temperature == 0:
        raise OptionError(
            f"`samples`: expected 1 with a temperature of 0, which gives the same answer each time, found {samples}; "
            "raise `temperature`"
        )
    path = Path(out)
    unfinished = path.with_name(f"{path.name}.unfinished")
    check_written(path, read=read, force=force)
    asked = [[query.query_id, prompt_of(query, model.tokenizer), query.completion] for query in queries]
    generation = [settings.max_new_tokens, settings.temperature, settings.top_p, settings.sampling_seed]
    digest = digest_of_json(
        [asked, *generation, settings.stop, settings.chat, samples, model.digest(), model.tokenizer_digest()]
    )
    kept = _Kept(unfinished, digest)
    with Progress("Answers", unit="queries", total=len(queries), shown=progress) as bar:
        bar.advance(len(kept.lines))
        for query in queries[len(kept.lines) :]:
            kept.add(_line(model, query, samples, settings))
            bar.advance(1)
    replace_bytes(path, b"".join(kept.lines))
    unfinished.unlink()
    return path


def check_written(path: Path, *, read: Sequence[Input], force: bool) -> None:
    """Raise if the answers cannot be written to a file, before long work.

    Raises:
        OptionError: The file exists, is read by the run, or cannot be written.
    """
    unfinished = path.with_name(f"{path.name}.unfinished")
    refuse_inputs([path, unfinished], read)
    check_replaceable(path, lambda _: False, force=force)
    check_replaceable(unfinished, _is_unfinished, force=force)
    for file in (path, unfinished):
        check_can_write(file)


def _line(model: LanguageModel, query: Query, samples: int, settings: GenerationSettings) -> bytes:
    texts = [
        generation.text for generation in generate_samples(model, query, samples, settings, query_id=query.query_id)
    ]
    fields = dict(query.record) or {"query_id": query.query_id, "prompt": query.prompt}
    fields[GENERATIONS] = texts
    if query.completion.strip() and query.kind not in ("choice", "open"):
        fields[CONFIDENCE] = sum(is_right(text, query, query.truth or query.completion) for text in texts) / samples
    return (json.dumps(fields, ensure_ascii=False, allow_nan=False) + "\n").encode()


class _Kept:
    """Answers so far, in a file whose first line is the digest of the question."""

    def __init__(self, file: Path, digest: str) -> None:
        self.lines: list[bytes] = []
        self._file = output_target(file)
        head = _head(digest)
        if self._file.exists():
            found = self._file.read_bytes().splitlines(keepends=True)
            if found and found[0] == head:
                self.lines = [line for line in found[1:] if line.endswith(b"\n")]  # the last may be cut
        replace_bytes(self._file, b"".join([head, *self.lines]))

    def add(self, line: bytes) -> None:
        """Keep one more."""
        with self._file.open("ab") as stream:
            stream.write(line)
        self.lines.append(line)


def _head(digest: str) -> bytes:
    return f'{{"answers_of": "{digest}"}}\n'.encode()


def _is_unfinished(file: Path) -> bool:
    with file.open("rb") as stream:
        return "answers_of" in json.loads(stream.readline(200))
