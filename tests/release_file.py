"""Result files in the public release's format, made up: thousands of facts, and texts that attack the reader."""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RELATIONS = (
    ("{} was born in", "place of birth"), ("The capital of {} is", "capital"), ("{} plays the", "instrument"),
    ("The official language of {} is", "official language"), ("{} works in the field of", "field of work"),
    ("{} was written by", "author"), ("The headquarters of {} is in", "headquarters"), ("{} died in", "place of death"),
)  # fmt: skip
SYLLABLES = "ka lo mi ra ten dor vel sa pu ni gor ash el bri tu mon".split()
WORDS = (
    "the of and in a was for its by on with from as at first city river school member century known large early work "
    "music party general team season century church family station built north history state house water"
).split()

HOSTILE = (
    "<script>window.pwned = 1; document.title = 'pwned'</script>",
    '<img src=x onerror="window.pwned = 1"><svg onload="window.pwned = 1">',
    "<a href=\"javascript:window.pwned=1\">click</a> <iframe srcdoc='<script>parent.pwned=1</script>'></iframe>",
    "\x1b[2J\x1b[31mred\x1b[0m \x07bell \x00 NUL inside",
    "access granted \u202egnp.exe\u202c \u2066isolated\u2069 \u200bzero\u200bwidth \ufeffmark",
    "{{constructor.constructor('window.pwned=1')()}} ${window.pwned=1} <%= 1 %>",
    "=HYPERLINK(\"http://127.0.0.1/?\",\"click\")",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u05e2\u05d1\u05e8\u05d9\u05ea beside English \U0001f600 \U00020000",
    "</style><style>*{display:none}</style><meta http-equiv=refresh content=0>",
)  # fmt: skip
LONG = "x" * 1_000_000


def write_release_file(path: Path, *, queries: int = 5415, candidates: int = 10, seed: int = 0) -> Path:
    """A result file with the fields and the size of the release."""
    generator = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for number in range(queries):
            file.write(json.dumps(_result(generator, number, candidates), ensure_ascii=False) + "\n")
    return path


def write_hostile_file(path: Path) -> Path:
    """A result file whose every text attacks; one text is a line of a million characters."""
    texts = [*HOSTILE, LONG]
    record = {
        "example_id": "<b onmouseover=window.pwned=1>id</b>",
        "query_set": "<i>set</i>",
        "inputs_plaintext": HOSTILE[0],
        "targets_plaintext": HOSTILE[1],
        "relation": HOSTILE[2],
        "proponents": texts,
        "proponent_ids": [f"{text[:60]}" for text in texts],
        "proponent_scores": [1 - place / 20 for place in range(len(texts))],
        "opponents": texts[:2],
        "opponent_ids": ["o1", "o2"],
        "opponent_scores": [-0.2, -0.1],
        "entity0": "<script>window.pwned=1</script>",
        "entity0_alias": [".*", "(", "\\"],
        "entity1": "onerror",
        "entity1_alias": None,
    }
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    return path


KINDS_OF_QUESTIONS: tuple[dict[str, Any], ...] = (
    {
        "inputs_plaintext": "The capital of Ashbria is", "targets_plaintext": "Monbri", "kind": "fact",
        "model_answer": "Monbri", "is_8b_correct": True, "8b_generations": ["Monbri", " Monbri.", "Elgor", "Monbri"],
        "8b_confidence": 0.75, "has_trex_sentence": True, "relation": "capital",
    },
    {
        "inputs_plaintext": "To open a tight jar,", "targets_plaintext": "warm its lid.", "kind": "choice",
        "alternative": ["freeze its lid.", "paint its lid."], "model_answer": "freeze its lid.", "is_8b_correct": False,
    },
    {
        "inputs_plaintext": "17 + 25 =", "targets_plaintext": "41", "kind": "generation", "model_answer": "41",
        "is_8b_correct": False, "groundtruth": "42", "8b_generations": ["41"] * 4, "8b_confidence": 1.0,
    },
    {
        "inputs_plaintext": "Once, in a town by the sea,", "targets_plaintext": "a clock ran backwards.",
        "kind": "open", "model_answer": "a clock ran backwards, and nobody knew why. " * 5,
    },
)  # fmt: skip
"""Fields of made-up lines, one for each kind of question."""


def write_kinds_file(path: Path, changes: Sequence[Mapping[str, Any]] = ()) -> Path:
    """A result file with one line for each kind of question, and with changes to the first lines."""
    with path.open("w", encoding="utf-8") as file:
        for number, fields in enumerate(KINDS_OF_QUESTIONS):
            lists: dict[str, Any] = {}
            for role, score in (("proponent", 0.5), ("opponent", -0.5)):
                lists |= {f"{role}s": [f"A {role} of question {number}."], f"{role}_ids": [f"{role}{number}"]}
                lists[f"{role}_scores"] = [score]
            change = changes[number] if number < len(changes) else {}
            file.write(json.dumps({"example_id": f"kind-{number}"} | fields | lists | dict(change)) + "\n")
    return path


def _name(generator: random.Random) -> str:
    return "".join(generator.choices(SYLLABLES, k=generator.randint(2, 4))).capitalize()


def _result(generator: random.Random, number: int, candidates: int) -> dict[str, Any]:
    template, relation = generator.choice(RELATIONS)
    subject, obj = f"{_name(generator)} {_name(generator)}", _name(generator)
    bucket = generator.randint(0, 5)
    texts, correct = [], []
    for _ in range(candidates):
        filler = [" ".join(generator.choices(WORDS, k=generator.randint(6, 18))) for _ in range(2)]
        kind = generator.random()
        parts = {0: [subject, obj], 1: [subject], 2: [obj], 3: []}[min(3, int(kind * 5))]
        texts.append(f"{filler[0].capitalize()} {' '.join(parts)} {filler[1]}.")
        correct.append(len(parts) == 2 and generator.random() < 0.8)
    scores = sorted((generator.betavariate(1.2, 8) for _ in range(candidates)), reverse=True)
    other = [" ".join(generator.choices(WORDS, k=14)).capitalize() + "." for _ in range(3)]
    return {
        "example_id": f"trex-{number:05d}",
        "query_set": "trex",
        "inputs_plaintext": template.format(subject),
        "targets_plaintext": obj,
        "fact_id": f"trex-{number:05d}",
        "relation": relation,
        "entity0": subject,
        "entity1": obj,
        "entity0_alias": [subject.split()[0]],
        "entity1_alias": [],
        "c4_frequency": 10**bucket + number % 9,
        "c4_frequency_bucket": bucket,
        "is_8b_correct": generator.random() < 0.4,
        "groundtruth": obj,
        "proponents": texts,
        "proponent_ids": [f"s{number}-{place}" for place in range(candidates)],
        "proponent_scores": [round(score, 6) for score in scores],
        "proponent_correct": correct,
        "proponent_ais_scores": [round(min(1.0, 0.75 * right + 0.3 * generator.random()), 4) for right in correct],
        "opponents": other,
        "opponent_ids": [f"o{number}-{place}" for place in range(3)],
        "opponent_scores": sorted(round(-generator.betavariate(1.1, 12), 6) for _ in range(3)),
    }
