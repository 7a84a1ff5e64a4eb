"""Changes one unit of what an answer depends on, between making an index and using it, and counts what is silent.

    python tests/faults/changes.py [--changes 200] [--seed N] [--name changes-cpu]

A change is drawn at random: a field of the model's configuration, the computation of attention or of a norm as another
version of a library might do it, a bit of the weights, of the tokenizer, of a stored code, scale, loss, token or text,
of V, R_train or W_train, or of a derived file. Then the index is queried, resumed, or extended. A change is

    detected   if that ends with one line that says what is wrong,
    harmless   if the result is the one without the change: the same candidates, scores, names and texts; the same rows,
    silent     if it is another result. Nothing may be silent. An exception that is not ours counts as silent, too.
"""

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

# Before anything that computes is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
_TESTS = Path(__file__).resolve().parents[1]
for _place in (_TESTS.parent / "benchmarks", _TESTS):
    if str(_place) not in sys.path:
        sys.path.insert(0, str(_place))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from faults.setting import KINDS, Kind, Setting, index, make_small  # noqa: E402
from trackstar.attribution.answering import answer_queries  # noqa: E402
from trackstar.corpus import Query  # noqa: E402
from trackstar.editing.adding import add_examples  # noqa: E402
from trackstar.errors import TrackstarError  # noqa: E402
from trackstar.store import Index  # noqa: E402

Outcome = Literal["detected", "harmless", "silent"]
Use = Literal["query", "query with re-ranking", "exact query", "resume", "add"]
USES: tuple[Use, ...] = ("query", "query with re-ranking", "exact query", "resume", "add")
_SCORE_TOLERANCE = 1e-3
"""Scores that differ by less are the same: other numbers of threads change them by 1e-6."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A change, what was done after it, and what came of that.

    Attributes:
        kind: What was changed.
        detail: Where, and how.
        use: What was done with the index.
        store: Kind of the index.
        outcome: See above.
        said: The line, or how the result differs.
    """

    kind: str
    detail: str
    use: Use
    store: Kind
    outcome: Outcome
    said: str


class Changes:
    """Draws changes and uses the changed things.

    Args:
        folder: An empty place.
        seed: Of the changes.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        make_small()
        self._folder = folder
        self._seed = seed
        self._random = random.Random(seed)
        setting = Setting.made(folder / "setting")
        self._expected: dict[tuple[Kind, Use], Any] = {}
        for kind in KINDS:
            index(setting, kind, str(setting.undisturbed(kind)))
            _half(setting.undisturbed(f"half {kind}"), setting, kind)
        self._original = folder / "setting"
        self._run_folder = folder / "setting-under-change"  # as the original, so that all paths have one length
        for kind in KINDS:
            for use in USES:
                with self._fresh() as fresh:
                    self._expected[kind, use] = _result(fresh, kind, use)

    @contextlib.contextmanager
    def _fresh(self) -> Iterator[Setting]:
        """A copy of the setting to change."""
        shutil.copytree(self._original, self._run_folder)
        place = self._run_folder
        try:
            yield Setting(
                folder=place,
                model=str(place / "model"),
                corpus=str(place / "corpus.jsonl"),
                further=str(place / "further.jsonl"),
            )
        finally:
            shutil.rmtree(place)

    def one(self) -> Change:
        """Draw a change and a use, and see what comes of it."""
        kind, use = self._random.choice(KINDS), self._random.choice(USES)
        what = self._random.choices(list(_CHANGES), weights=[weight for weight, _ in _CHANGES.values()])[0]
        with self._fresh() as fresh, contextlib.ExitStack() as stack:
            detail = _CHANGES[what][1](fresh, kind, use, self._random, stack)
            try:
                found = _result(fresh, kind, use)
            except TrackstarError as error:
                outcome, said = ("detected", str(error)) if "\n" not in str(error) else ("silent", repr(str(error)))
            except Exception as error:
                outcome, said = "silent", f"{type(error).__name__}: {error}"
            else:
                difference = _difference(found, self._expected[kind, use])
                outcome, said = ("harmless", "") if difference is None else ("silent", difference)
        said = said.replace(str(self._run_folder), "SETTING")
        return Change(kind=what, detail=detail, use=use, store=kind, outcome=outcome, said=said)  # pyright: ignore[reportArgumentType]


# ---- Uses ---------------------------------------------------------------------------------------------------------


def _half(out: Path, setting: Setting, kind: Kind) -> None:
    """An index as a run leaves it that is killed halfway."""
    from trackstar.indexing import shard_writing

    class Killed(BaseException):
        pass

    kept = shard_writing.shard_content

    def some(parts: Any) -> Any:
        if len(list((out / "shards").glob("*.safetensors"))) == 2:  # the first pass has its own folder
            raise Killed
        return kept(parts)

    shard_writing.shard_content = some
    try:
        with contextlib.suppress(Killed):
            index(setting, kind, str(out))
    finally:
        shard_writing.shard_content = kept
    assert len(list((out / "shards").iterdir())) == 2


def _questions() -> list[Query]:
    texts = [("Paris is the capital", "of France"), ("people in Germany speak", "Berlin"), ("Berlin is", "the people")]
    return [Query(query_id=str(n), prompt=prompt, completion=answer) for n, (prompt, answer) in enumerate(texts)]


def _result(setting: Setting, kind: Kind, use: Use) -> Any:
    """What a use gives: ranked candidates, or every row of an index, decoded, with its text."""
    if use in ("query", "query with re-ranking", "exact query"):
        reranked = 40 if use == "query with re-ranking" else 0
        options: dict[str, Any] = {"exact": True} if use == "exact query" else {"reranked": reranked}
        report = answer_queries(
            setting.undisturbed(kind),
            _questions(),
            model=setting.model,
            k=7,
            batch_tokens=256,
            progress=False,
            **options,
        )
        return [
            [(one.example_id, one.text, one.influence) for one in (*result.proponents, *result.opponents)]
            for result in report.results
        ]
    if use == "resume":
        out = setting.undisturbed(f"half {kind}")
        index(setting, kind, str(out))
    else:
        out = setting.folder / "added"
        add_examples(
            setting.undisturbed(kind), setting.further, out, model=setting.model, batch_tokens=256, progress=False
        )
    opened = Index.open(out)
    opened.check()
    texts = [(one.example.example_id, one.example.text, one.loss) for one in opened.examples()]
    rows = torch.cat([shard.stored.decode() for shard in opened.shards])
    return texts, rows.numpy()


def _difference(found: Any, expected: Any) -> str | None:
    """How a result differs from the one without a change; None if it is the same but for rounding."""
    if isinstance(found, list):
        for number, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
            scores = [np.array([score for _, _, score in ranking]) for ranking in (mine, theirs)]
            if not np.allclose(*scores, atol=_SCORE_TOLERANCE):
                return f"query {number}: scores {scores[0].round(4)}, expected {scores[1].round(4)}"
            known = {name: (text, score) for name, text, score in theirs}
            for name, text, score in mine:
                if name in known and known[name][0] != text:
                    return f"query {number}: {name} has another text"
                # Candidates whose scores are the same but for rounding may change places, at the end of the list too.
                if name not in known and abs(abs(score) - min(abs(s) for s in scores[1])) > 2 * _SCORE_TOLERANCE:
                    return f"query {number}: {name} is ranked, which was not"
        return None
    texts, rows = found
    if [one[:2] for one in texts] != [one[:2] for one in expected[0]]:
        return "other names or texts"
    losses = [np.array([one[2] for one in part]) for part in (texts, expected[0])]
    if not np.allclose(*losses, rtol=1e-4, atol=1e-4):
        return "other losses"
    norms = np.linalg.norm(expected[1], axis=1)
    distance = np.linalg.norm(rows - expected[1], axis=1) / np.where(norms > 0, norms, 1)
    worst = int(distance.argmax())
    return f"row {worst} is another, by {distance[worst]:.3g} of its norm" if distance[worst] > 0.02 else None


# ---- Changes ------------------------------------------------------------------------------------------------------

_ChangeOf = Callable[[Setting, Kind, Use, random.Random, contextlib.ExitStack], str]


def _index_of(setting: Setting, kind: Kind, use: Use) -> Path:
    return setting.undisturbed(f"half {kind}" if use == "resume" else kind)


def _configuration(setting: Setting, _kind: Kind, _use: Use, generator: random.Random, _: contextlib.ExitStack) -> str:
    """A field of config.json, by one step."""
    file = Path(setting.model) / "config.json"
    fields = json.loads(file.read_text())
    name = generator.choice([name for name, value in fields.items() if value is not None and name != "architectures"])
    fields[name] = _stepped(name, fields[name], generator)
    file.write_text(json.dumps(fields))
    return f"{name} = {json.dumps(fields[name])[:60]}"


def _stepped(name: str, value: Any, generator: random.Random) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + generator.choice((-1, 1)) if value else 1
    if isinstance(value, float):
        return value * generator.choice((0.1, 0.5, 1.001, 2.0, 10.0)) if value else 0.1
    if isinstance(value, dict):
        key = generator.choice(sorted(value))
        return value | {key: _stepped(key, value[key], generator)}
    if isinstance(value, list):
        return value[1:]
    choices = {"hidden_act": ("gelu", "relu", "gelu_new"), "dtype": ("bfloat16", "float64"), "rope_type": ("linear",)}
    return generator.choice(choices.get(name, (f"{value}x",)))


def _library(_setting: Setting, _kind: Kind, _use: Use, generator: random.Random, stack: contextlib.ExitStack) -> str:
    """The computation of a part of the model, as another version or implementation might do it."""
    from transformers.models.llama import modeling_llama as llama

    kind = generator.choice(("attention's scale", "no causal mask", "rounded attention", "norm's epsilon", "rotation",
                             "activation", "the same attention, computed another way"))  # fmt: skip
    factor = generator.choice((0.5, 0.9, 1.05, 2.0))

    def patch(place: Any, name: str, new: Any) -> None:
        stack.callback(setattr, place, name, getattr(place, name))
        setattr(place, name, new)

    sdpa = torch.nn.functional.scaled_dot_product_attention

    def attention(query: Any, key: Any, value: Any, *arguments: Any, **options: Any) -> Any:
        if kind == "attention's scale":
            query = query * factor
        elif kind == "no causal mask":
            options |= {"is_causal": False, "attn_mask": None}
        elif kind == "rounded attention":
            query, key = query.to(torch.bfloat16).float() * factor, key.to(torch.bfloat16).float()
        else:
            query, key, value = (part.double() for part in (query, key, value))
            return sdpa(query, key, value, *arguments, **options).float()
        return sdpa(query, key, value, *arguments, **options)

    if kind == "norm's epsilon":
        forward = llama.LlamaRMSNorm.forward

        def norm(self: Any, hidden: Any) -> Any:
            self.variance_epsilon = 0.01 * factor
            return forward(self, hidden)

        patch(llama.LlamaRMSNorm, "forward", norm)
    elif kind == "rotation":
        rotated = llama.apply_rotary_pos_emb
        patch(llama, "apply_rotary_pos_emb", lambda q, k, cos, sin, *rest, **o: rotated(q, k, cos, -sin, *rest, **o))
    elif kind == "activation":
        silu = torch.nn.functional.silu
        patch(torch.nn.functional, "silu", lambda values, **options: silu(values, **options) * factor)
    else:
        patch(torch.nn.functional, "scaled_dot_product_attention", attention)
    return f"{kind} ({factor})" if kind not in ("no causal mask", "rotation") else kind


def _flip(file: Path, first: int, stop: int, generator: random.Random) -> str:
    content = bytearray(file.read_bytes())
    position, bit = generator.randrange(first, stop), generator.randrange(8)
    content[position] ^= 1 << bit
    file.write_bytes(content)
    return f"{file.name}, byte {position}, bit {bit}"


def _of_shard(*names: str) -> _ChangeOf:
    """A bit of a tensor of a shard."""

    def change(setting: Setting, kind: Kind, use: Use, generator: random.Random, _: contextlib.ExitStack) -> str:
        opened = Index.open(_index_of(setting, kind, use), allow_incomplete=True)
        shard = generator.choice(opened.shards)
        name = generator.choice(names)
        info = shard.file.tensors[name]
        return f"{name}: {_flip(Path(str(shard.path)), info.start, info.stop, generator)}"

    return change


def _token(setting: Setting, kind: Kind, use: Use, generator: random.Random, _: contextlib.ExitStack) -> str:
    """A stored token, to the next one or to one beyond the vocabulary."""
    opened = Index.open(_index_of(setting, kind, use), allow_incomplete=True)
    shard = generator.choice(opened.shards)
    info = shard.file.tensors["tokens"]
    place = info.start + 4 * generator.randrange(shard.tokens)
    content = bytearray(Path(str(shard.path)).read_bytes())
    old = int.from_bytes(content[place : place + 4], "little")
    new = generator.choice((old + 1, old + 10**6))
    content[place : place + 4] = new.to_bytes(4, "little")
    Path(str(shard.path)).write_bytes(content)
    return f"token {old} became {new}"


def _file_of_index(setting: Setting, kind: Kind, use: Use, generator: random.Random, _: contextlib.ExitStack) -> str:
    """A bit of any other file of the index."""
    folder = _index_of(setting, kind, use)
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.stat().st_size]
    file = generator.choice([file for file in files if file.parent.name != "shards"])
    return _flip(file, 0, file.stat().st_size, generator)


def _weight(setting: Setting, _kind: Kind, _use: Use, generator: random.Random, _: contextlib.ExitStack) -> str:
    file = Path(setting.model) / "model.safetensors"
    first = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    return _flip(file, first, file.stat().st_size, generator)


def _tokenizer(setting: Setting, _kind: Kind, _use: Use, generator: random.Random, _: contextlib.ExitStack) -> str:
    """Two entries of the vocabulary exchanged."""
    file = Path(setting.model) / "tokenizer.json"
    fields = json.loads(file.read_text())
    vocabulary = fields["model"]["vocab"]
    one, two = generator.sample(sorted(vocabulary), 2)
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    file.write_text(json.dumps(fields))
    return f"{one!r} and {two!r} exchanged"


def _corpus(setting: Setting, _kind: Kind, use: Use, generator: random.Random, _: contextlib.ExitStack) -> str:
    """A letter of the indexed corpus; only a resumed run reads it."""
    file = Path(setting.corpus)
    lines = file.read_text().splitlines()
    number = generator.choice([number for number, line in enumerate(lines) if "capital" in line or "people" in line])
    lines[number] = lines[number].replace("capital", "capitol").replace("people", "peoples")
    file.write_text("\n".join(lines) + "\n")
    return f"record {number}, used by {use}"


_CHANGES: dict[str, tuple[int, _ChangeOf]] = {
    "configuration": (5, _configuration),
    "library": (4, _library),
    "token": (3, _token),
    "codes": (3, _of_shard("codes")),
    "scales, norms or losses": (3, _of_shard("scales", "norms", "losses", "target_counts")),
    "text, name or mask": (3, _of_shard("text", "ids", "parents", "target_masks")),
    "places": (2, _of_shard("records", "windows", "token_offsets", "text_offsets", "id_offsets", "parent_offsets")),
    "checksums": (1, _of_shard("checksums")),
    "other file of the index": (3, _file_of_index),
    "weight": (1, _weight),
    "tokenizer": (1, _tokenizer),
    "corpus": (1, _corpus),
}
"""Kinds of changes, with how often each is drawn."""


def changes(folder: Path, count: int, seed: int, tell: Callable[[Change], None] = lambda _: None) -> dict[str, Any]:
    """Draw changes and count their outcomes.

    Args:
        folder: An empty place.
        count: How many.
        seed: Of the changes.
        tell: Receives each.
    """
    drawn = Changes(folder, seed)
    made = []
    for _ in range(count):
        made.append(drawn.one())
        tell(made[-1])
    outcomes = Counter(change.outcome for change in made)
    return {
        "seed": seed,
        "changes": count,
        **{outcome: outcomes[outcome] for outcome in ("detected", "harmless", "silent")},
        "by_kind": {kind: dict(Counter(change.outcome for change in made if change.kind == kind)) for kind in _CHANGES},
        "by_use": {use: dict(Counter(change.outcome for change in made if change.use == use)) for use in USES},
        "harmless_changes": [f"{one.kind}: {one.detail}; {one.use}" for one in made if one.outcome == "harmless"],
        "silent_changes": [dataclasses.asdict(one) for one in made if one.outcome == "silent"],
    }


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--changes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--name", default="changes-cpu", help="of the file in benchmarks/results; empty keeps none")
    arguments = parser.parse_args()
    seed = random.SystemRandom().randrange(10**9) if arguments.seed is None else arguments.seed
    print(f"seed {seed}", file=sys.stderr, flush=True)

    def tell(change: Change) -> None:
        line = f"{change.outcome:<9}{change.kind}: {change.detail}; {change.use}, {change.store}: {change.said}"
        print(line[:300], file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="trackstar-changes-") as folder:
        figures = changes(Path(folder), arguments.changes, seed, tell)
    if arguments.name:
        importlib.import_module("measurement").save(arguments.name, figures)
    print(f"{figures['detected']} detected, {figures['harmless']} harmless, {figures['silent']} silent")
    return 1 if figures["silent"] else 0


if __name__ == "__main__":
    sys.exit(main())
