"""Does an example entail a fact? The open-set evaluation (paper, §6): no gold examples, a model judges what is found.

An example is split into sentences, every window of three consecutive ones is judged, and the highest score counts.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trackstar.corpus.data_files import one_line
from trackstar.corpus.fields import encodable
from trackstar.errors import ModelError, OptionError
from trackstar.model.language_model import context_tokens
from trackstar.model.loading import checked_device, load_pretrained, load_pretrained_tokenizer
from trackstar.progress import Progress

THRESHOLD = 0.5
"""Probability of entailment above which an example counts as entailing the fact."""

WINDOW_SENTENCES = 3

_TEXTS_AT_ONCE = 256
_PAIRS_AT_ONCE = 32

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
    """Anything that judges whether premises entail hypotheses."""

    def scores(self, premises: Sequence[str], hypotheses: Sequence[str]) -> Float[Tensor, "pairs"]:
        """The probability, from 0 to 1, that each premise entails the hypothesis at the same place."""
        ...


def sentences(text: str) -> list[str]:
    """A text's sentences, without white space around them.

    A sentence ends at a line's end, and at periods, question and exclamation marks, with the quotes and brackets
    that close after them, if white space follows and then anything but a small letter. A single period after one
    letter (an initial), after an abbreviation with a period in it ("U.S.") and after common titles and abbreviations
    ("Dr.", "No.") ends none. Chinese and Japanese full stops always end one.
    """
    found: list[str] = []
    for line in text.splitlines():
        start = 0
        for end in _END.finditer(line):
            if _ends_sentence(line, end):
                found.append(line[start : end.end()])
                start = end.end()
        found.append(line[start:])
    return [sentence.strip() for sentence in found if sentence.strip()]


def windows(text: str, size: int = WINDOW_SENTENCES) -> list[str]:
    """Every run of `size` consecutive sentences, joined by spaces; all sentences where there are no more.

    Raises:
        OptionError: `size` is below 1.
    """
    if size < 1:
        raise OptionError(f"windows of {size} sentences; expected 1 or more")
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
    """How strongly each example entails the fact at the same place: the maximum over the example's windows.

    Args:
        texts: The examples' texts.
        hypotheses: The facts as sentences: prompt and completion, as `query_text` joins them.
        scorer: What judges.
        window_sentences: Sentences of a window; the paper's 3.
        progress: Whether there may be a bar.

    Returns:
        Probabilities from 0 to 1; 0 for a text without a sentence.

    Raises:
        OptionError: There are not as many hypotheses as texts, or windows of no sentence are asked for.
    """
    if len(texts) != len(hypotheses):
        raise OptionError(f"{len(texts)} texts and {len(hypotheses)} hypotheses; expected one each")
    scores = torch.zeros(len(texts))
    with Progress("Judging", unit="examples", total=len(texts), shown=progress) as bar:
        for first in range(0, len(texts), _TEXTS_AT_ONCE):
            places = range(first, min(first + _TEXTS_AT_ONCE, len(texts)))
            pairs = [(place, window) for place in places for window in windows(texts[place], window_sentences)]
            if pairs:
                found = scorer.scores([window for _, window in pairs], [hypotheses[place] for place, _ in pairs])
                scores.scatter_reduce_(0, torch.tensor([place for place, _ in pairs]), found.float().cpu(), "amax")
            bar.advance(len(places))
    return scores


def entails(scores: Float[Tensor, "pairs"], *, threshold: float = THRESHOLD) -> Bool[Tensor, "pairs"]:
    """Whether an example counts as entailing its fact: its score is above the threshold."""
    return scores > threshold


class EntailmentClassifier:
    """An `EntailmentScorer` from a sequence classification model; made by `load_entailment_classifier`.

    Args:
        module: The Transformers model.
        tokenizer: Its tokenizer.
        label: The number of the label that means entailment.
        most_tokens: Tokens of premise and hypothesis after which the longer of the two is cut off.
    """

    def __init__(self, module: Any, tokenizer: Any, *, label: int, most_tokens: int) -> None:
        self._module = module
        self._tokenizer = tokenizer
        self._label = label
        self._most_tokens = most_tokens

    @torch.no_grad()
    def scores(self, premises: Sequence[str], hypotheses: Sequence[str]) -> Float[Tensor, "pairs"]:
        """See `EntailmentScorer.scores`; pairs are run in batches of similar length.

        Raises:
            CorpusError: A text holds half a surrogate pair.
        """
        pairs = [
            (encodable(premise, f"premise {place}"), encodable(hypothesis, f"hypothesis {place}"))
            for place, (premise, hypothesis) in enumerate(zip(premises, hypotheses, strict=True))
        ]
        order = sorted(range(len(pairs)), key=lambda place: -sum(map(len, pairs[place])))
        scores = torch.zeros(len(pairs))
        for first in range(0, len(order), _PAIRS_AT_ONCE):
            places = order[first : first + _PAIRS_AT_ONCE]
            inputs = self._tokenizer(
                [pairs[place][0] for place in places],
                [pairs[place][1] for place in places],
                truncation=True,
                max_length=self._most_tokens,
                padding=True,
                return_tensors="pt",
            )
            logits = self._module(**inputs.to(self._module.device)).logits.float()
            scores[places] = logits.softmax(dim=-1)[:, self._label].cpu()
        return scores


def load_entailment_classifier(source: str | Path, *, device: str = "cpu") -> EntailmentClassifier:
    """Load a natural-language-inference model: a sequence classification model with a label named `entailment`.

    Weights are read from safetensors alone; code that comes with a model is never run.

    Args:
        source: A Transformers model folder or hub name.
        device: A torch device, such as `cpu` or `cuda`.

    Raises:
        ModelError: It cannot be loaded, has no label `entailment`, or cannot judge a pair of texts.
        OptionError: The device is not there.
    """
    target = checked_device(device)
    module, tokenizer = _loaded(str(source))
    module.eval().requires_grad_(False).to(target)
    labels = {number: str(name) for number, name in (module.config.id2label or {}).items()}
    named = [int(number) for number, name in labels.items() if name.lower() == "entailment"]
    if len(named) != 1:
        found = one_line(", ".join(labels.values())) or "none"
        raise ModelError(
            f"{source}: has the labels {found}; expected one named entailment among them (config.id2label)"
        )
    limit = tokenizer.model_max_length
    most_tokens = min(context_tokens(module), limit if isinstance(limit, int) and limit > 0 else 2**20)
    classifier = EntailmentClassifier(module, tokenizer, label=named[0], most_tokens=most_tokens)
    try:
        score = classifier.scores(["a word", "two more words"], ["a word", "a word"])
    except Exception as error:  # whatever the model's own code raises
        reason = one_line(error) or type(error).__name__
        raise ModelError(f"{source}: cannot judge a pair of texts ({reason}); expected an entailment model") from None
    if not torch.isfinite(score).all():
        raise ModelError(f"{source}: its scores are not finite; expected finite weights; copy the model again")
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
    before = line[max(0, end.start() - _LONGEST_ABBREVIATION) : end.start()].split()
    word = before[-1].lstrip(_OPENING) if before and not line[end.start() - 1].isspace() else ""
    initial = len(word) == 1 and word.isalpha() and word.isupper()
    return not (initial or "." in word or word.lower() in _ABBREVIATIONS)


def _loaded(source: str) -> tuple[Any, Any]:
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
