"""Entailment of facts by examples, for the open-set evaluation without gold examples (paper, §6).

An example is split into sentences. A model judges every window of three consecutive sentences; the
highest score counts.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trackstar.corpus.fields import encodable
from trackstar.errors import ModelError, OptionError, check_at_least
from trackstar.model.devices import resolved_device
from trackstar.model.language_model import context_tokens
from trackstar.model.loading import load_pretrained, load_pretrained_tokenizer
from trackstar.progress import Progress
from trackstar.text import one_line

THRESHOLD = 0.5
"""Probability of entailment above which an example counts as entailing the fact."""

WINDOW_SENTENCES = 3
"""Sentences per window."""

_TEXTS_PER_BATCH = 256
_PAIRS_PER_BATCH = 32

_END = re.compile(r"(?<![.!?…])[.!?…]++[\"'”’»)\]]*+\s++|[。！？]++[」』”’）]*+\s*+")
_OPENING = "\"'“‘«([「『（"
_FIRST_LETTER = re.compile(f"[{re.escape(_OPENING)}]*+(.)")
_ABBREVIATIONS = frozenset(
    "mr mrs ms dr prof st sr jr gen col capt cmdr lt sgt maj rev hon gov sen rep pres no vol fig ca approx vs etc inc "
    "ltd co corp mt ft jan feb mar apr jun jul aug sep sept oct nov dec".split()
)
_LONGEST_ABBREVIATION = 12


@runtime_checkable
class EntailmentScorer(Protocol):
    """A model that judges whether premises entail hypotheses."""

    def scores(self, premises: Sequence[str], hypotheses: Sequence[str]) -> Float[Tensor, "pairs"]:
        """Probability, from 0 to 1, that each premise entails the hypothesis with the same number."""
        ...


def sentences(text: str) -> list[str]:
    """Split a text into sentences, without white space around them.

    A sentence ends at the end of a line, and at periods, question marks and exclamation marks,
    including the quotes and brackets that close after them, if white space follows and then
    anything but a lower-case letter. A single period does not end a sentence after one capital
    letter (an initial), after an abbreviation with a period in it ("U.S.") and after common titles
    and abbreviations ("Dr.", "No."). A Chinese or Japanese full stop always ends one.
    """
    parts: list[str] = []
    for line in text.splitlines():
        start = 0
        for end in _END.finditer(line):
            if _ends_sentence(line, end):
                parts.append(line[start : end.end()])
                start = end.end()
        parts.append(line[start:])
    return [sentence.strip() for sentence in parts if sentence.strip()]


def windows(text: str, size: int = WINDOW_SENTENCES) -> list[str]:
    """Every run of `size` consecutive sentences, joined by spaces; one window if there are fewer.

    Raises:
        OptionError: `size` is below 1.
    """
    check_at_least("size", size)
    parts = sentences(text)
    return [" ".join(parts[first : first + size]) for first in range(max(len(parts) - size, 0) + 1)] if parts else []


def entailment_scores(
    texts: Sequence[str],
    hypotheses: Sequence[str],
    scorer: EntailmentScorer,
    *,
    window_sentences: int = WINDOW_SENTENCES,
    progress: bool = True,
) -> Float[Tensor, "pairs"]:
    """Score how strongly each example entails its fact: the maximum over the example's windows.

    Args:
        texts: Texts of the examples.
        hypotheses: The fact of each example, as a sentence: prompt and completion, as `query_text`
            joins them.
        scorer: The model that judges.
        window_sentences: Sentences per window; 3 in the paper.
        progress: Whether progress is shown.

    Returns:
        Probabilities from 0 to 1; 0 for a text without a sentence.

    Raises:
        OptionError: The numbers of texts and hypotheses differ, or `window_sentences` is below 1.
    """
    if len(texts) != len(hypotheses):
        raise OptionError(f"`hypotheses`: expected one for each of {len(texts)} texts, found {len(hypotheses)}")
    scores = torch.zeros(len(texts))
    with Progress("Judging", unit="examples", total=len(texts), shown=progress) as bar:
        for first in range(0, len(texts), _TEXTS_PER_BATCH):
            batch = range(first, min(first + _TEXTS_PER_BATCH, len(texts)))
            pairs = [(number, window) for number in batch for window in windows(texts[number], window_sentences)]
            if pairs:
                of_windows = scorer.scores([window for _, window in pairs], [hypotheses[n] for n, _ in pairs])
                scores.scatter_reduce_(0, torch.tensor([n for n, _ in pairs]), of_windows.float().cpu(), "amax")
            bar.advance(len(batch))
    return scores


def entails(scores: Float[Tensor, "pairs"], *, threshold: float = THRESHOLD) -> Bool[Tensor, "pairs"]:
    """Whether each example counts as entailing its fact: whether its score is above the threshold."""
    return scores > threshold


class EntailmentClassifier:
    """An `EntailmentScorer` that uses a sequence classification model; made by `load_entailment_classifier`.

    Args:
        module: The Transformers model.
        tokenizer: Its tokenizer.
        label: Number of the label that means entailment.
        most_tokens: Most tokens of premise and hypothesis together; the longer one is truncated.
    """

    def __init__(self, module: Any, tokenizer: Any, *, label: int, most_tokens: int) -> None:
        self._module = module
        self._tokenizer = tokenizer
        self._label = label
        self._most_tokens = most_tokens

    @torch.no_grad()
    def scores(self, premises: Sequence[str], hypotheses: Sequence[str]) -> Float[Tensor, "pairs"]:
        """See `EntailmentScorer.scores`; pairs are judged in batches of similar length.

        Raises:
            CorpusError: A text holds half a surrogate pair.
        """
        pairs = [
            (encodable(premise, f"premise {number}"), encodable(hypothesis, f"hypothesis {number}"))
            for number, (premise, hypothesis) in enumerate(zip(premises, hypotheses, strict=True))
        ]
        order = sorted(range(len(pairs)), key=lambda number: -sum(map(len, pairs[number])))
        scores = torch.zeros(len(pairs))
        for first in range(0, len(order), _PAIRS_PER_BATCH):
            batch = order[first : first + _PAIRS_PER_BATCH]
            inputs = self._tokenizer(
                [pairs[number][0] for number in batch],
                [pairs[number][1] for number in batch],
                truncation=True,
                max_length=self._most_tokens,
                padding=True,
                return_tensors="pt",
            )
            logits = self._module(**inputs.to(self._module.device)).logits.float()
            scores[batch] = logits.softmax(dim=-1)[:, self._label].cpu()
        return scores


def load_entailment_classifier(source: str | Path, *, device: str = "auto") -> EntailmentClassifier:
    """Load a model for natural-language inference: a sequence classifier with a label named `entailment`.

    Weights are read from safetensors only; code that comes with a model is never run.

    Args:
        source: A Transformers model folder or hub name.
        device: A torch device, such as `cpu` or `cuda`.

    Raises:
        ModelError: The model cannot be loaded, has no label `entailment`, or cannot judge a pair of
            texts.
        OptionError: The device is not available.
    """
    target = resolved_device(device)
    module, tokenizer = _load(str(source))
    module.eval().requires_grad_(False).to(target)
    labels = {number: str(name) for number, name in (module.config.id2label or {}).items()}
    named = [int(number) for number, name in labels.items() if name.lower() == "entailment"]
    if len(named) != 1:
        found = one_line(", ".join(labels.values())) or "none"
        raise ModelError(f"{source}: expected one label named entailment (config.id2label), found {found}")
    limit = tokenizer.model_max_length
    most_tokens = min(context_tokens(module), limit if isinstance(limit, int) and limit > 0 else 2**20)
    classifier = EntailmentClassifier(module, tokenizer, label=named[0], most_tokens=most_tokens)
    try:
        score = classifier.scores(["a word", "two more words"], ["a word", "a word"])
    except Exception as error:  # any error of the model's own code
        reason = one_line(error) or type(error).__name__
        raise ModelError(f"{source}: cannot judge a pair of texts ({reason}); expected an entailment model") from None
    if not torch.isfinite(score).all():
        raise ModelError(f"{source}: expected finite scores, found NaN or infinity; copy the model again")
    return classifier


def _ends_sentence(line: str, end: re.Match[str]) -> bool:
    mark = end.group().rstrip()
    if mark[0] in "。！？":
        return True
    following = _FIRST_LETTER.match(line, end.end())
    if following is not None and following[1].islower():
        return False
    if mark != ".":
        return True
    # A single period: look at the word before it.
    before = line[max(0, end.start() - _LONGEST_ABBREVIATION) : end.start()].split()
    word = before[-1].lstrip(_OPENING) if before and not line[end.start() - 1].isspace() else ""
    initial = len(word) == 1 and word.isalpha() and word.isupper()
    return not (initial or "." in word or word.lower() in _ABBREVIATIONS)


def _load(source: str) -> tuple[Any, Any]:
    module = load_pretrained(
        "AutoModelForSequenceClassification",
        source,
        name=source,
        purpose="a sequence classification model",
        expected="a Hugging Face model folder or hub name with config.json, safetensors weights and a tokenizer",
        whole="a complete classifier (its judgements would be random otherwise)",
        dtype=torch.float32,
    )
    return module, load_pretrained_tokenizer(source, name=source)
