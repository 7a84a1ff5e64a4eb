"""Generation, greedy or sampled, with each token's probability, so that any part of it can be attributed.

A generation keeps its tokens: `Generation.query` asks for exactly these, not for their text tokenized anew.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from trackstar.corpus import Query, Tokenizer, prompt_of, prompt_tokens, token_texts
from trackstar.corpus.digests import draw_bytes
from trackstar.errors import OptionError, check_at_least
from trackstar.model.batching import missing_embedding
from trackstar.model.generation_settings import GenerationSettings
from trackstar.model.language_model import LanguageModel
from trackstar.progress import Progress
from trackstar.text import abridged, one_line

MOST_SAMPLES = 10_000
_AT_ONCE = 64


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedToken:
    """One generated token.

    Attributes:
        token_id: The token.
        start: Its first character in the text.
        stop: The character after its last; equal to `start` if it only begins a character.
        probability: The model's probability of it, given everything before it; not that of the
            tempered distribution that it was sampled from.
    """

    token_id: int
    start: int
    stop: int
    probability: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What the model said after a prompt.

    Attributes:
        prompt: The text of the prompt, in the chat template if one was used.
        text: The text that was generated, with the white space at its ends. The prompt and it are
            the whole text.
        prompt_ids: The tokens of the prompt, special tokens included.
        tokens: The generated tokens, in order, without the end-of-text token; their spans do not
            overlap.
    """

    prompt: str
    text: str
    prompt_ids: tuple[int, ...]
    tokens: tuple[GeneratedToken, ...]

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The tokens of the prompt and of the answer."""
        return (*self.prompt_ids, *(token.token_id for token in self.tokens))

    @property
    def probability(self) -> float:
        """The model's probability of all generated tokens."""
        return math.exp(math.fsum(math.log(max(token.probability, 1e-300)) for token in self.tokens))

    def query(
        self, query_id: str, *, first: int = 0, last: int | None = None, record: Mapping[str, object] | None = None
    ) -> Query:
        """The query that asks why the model said this, token for token.

        Args:
            query_id: Its name in results.
            first: The first generated token to explain; those before it become part of the prompt.
            last: The last one; None is the last of all.
            record: Fields that results carry.

        Raises:
            OptionError: The answer has no such tokens.
        """
        count = len(self.tokens)
        last = count - 1 if last is None else last
        if not 0 <= first <= last < count:
            raise OptionError(
                f"`first`, `last`: expected two of the {count} generated tokens, counted from 0, in order, found "
                f"{first} and {last}"
            )
        start, stop = self.tokens[first].start, self.tokens[last].stop
        before = len(self.prompt_ids) + first
        targets = last - first + 1
        return Query(
            query_id=query_id,
            prompt=self.prompt + self.text[:start],
            completion=self.text[start:stop],
            record=record or {},
            token_ids=self.token_ids[: before + targets],
            target_mask=(False,) * before + (True,) * targets,
        )


def generate(
    model: LanguageModel,
    prompt: str | Query,
    settings: GenerationSettings | None = None,
    *,
    query_id: str | None = None,
) -> Generation:
    """What the model says after a prompt; see `GenerationSettings` for the defaults.

    Special tokens precede the prompt as in training. A conversation has those of its template, and no
    others.

    Args:
        model: The model.
        prompt: Text to continue, a user's message, or a query, whose prompt or conversation is
            continued.
        settings: How to generate; None is greedily, up to 16 tokens or the end of the line.
        query_id: Name of the prompt in messages.

    Raises:
        OptionError: The prompt leaves no room in the model's context, or has no token, or the
            tokenizer has no chat template.
        ModelError: A token of the prompt has no embedding.
    """
    return generate_samples(model, prompt, 1, settings, query_id=query_id)[0]


def generate_samples(
    model: LanguageModel,
    prompt: str | Query,
    samples: int,
    settings: GenerationSettings | None = None,
    *,
    query_id: str | None = None,
) -> list[Generation]:
    """Several answers to one prompt, computed side by side; arguments and errors as of `generate`.

    Equal seeds draw equal answers, whatever else is generated. Without a temperature all are equal.
    """
    settings = settings or GenerationSettings()
    check_samples(samples)
    query = prompt if isinstance(prompt, Query) else Query(query_id="prompt", prompt=prompt)
    if settings.chat and query.messages is None:
        query = _as_message(query, model.tokenizer)
    text = prompt_of(query, model.tokenizer)
    token_ids = prompt_tokens(text, model.tokenizer, special_tokens=query.messages is None)
    _check_prompt(model, token_ids, settings, query_id)
    parts = (range(first, min(first + _AT_ONCE, samples)) for first in range(0, samples, _AT_ONCE))
    return [one for numbers in parts for one in continuations(model, text, token_ids, numbers, settings)]


def check_samples(samples: int) -> None:
    """Raise if so many answers to a prompt cannot be generated.

    Raises:
        OptionError: The number is below 1 or above `MOST_SAMPLES`.
    """
    check_at_least("samples", samples)
    if samples > MOST_SAMPLES:
        raise OptionError(f"`samples`: expected at most {MOST_SAMPLES:,}, found {abridged(samples)}")


def _as_message(query: Query, tokenizer: Any) -> Query:
    """The query's prompt as a user's message.

    Raises:
        OptionError: There is no chat template.
    """
    if query.chat_template is None and not getattr(tokenizer, "chat_template", None):
        raise OptionError(
            "`chat`: expected a tokenizer with a chat template, found one without; leave it out, or pass a file with "
            "the template of the training run as `chat_template`"
        )
    return dataclasses.replace(query, messages=({"role": "user", "content": query.prompt},))


@torch.no_grad()
def continuations(
    model: LanguageModel, prompt: str, prompt_ids: Sequence[int], numbers: Sequence[int], settings: GenerationSettings
) -> list[Generation]:
    """Several continuations of tokens, computed side by side.

    Args:
        model: The model.
        prompt: The text of the tokens, for the results.
        prompt_ids: The tokens.
        numbers: The continuations' numbers; a number and the seed decide what is drawn.
        settings: How to generate.

    Raises:
        OptionError: The tokens leave no room in the model's context, or there is none.
        ModelError: A token has no embedding.
    """
    _check_prompt(model, prompt_ids, settings, None)
    ends = _end_tokens(model)
    answers = [_Answer(model.tokenizer, tuple(prompt_ids), settings) for _ in numbers]
    generators = [_generator(settings.sampling_seed, prompt_ids, number) for number in numbers]
    past, inputs = None, torch.tensor([list(prompt_ids)] * len(numbers), device=model.device)
    with (
        model.frozen(),
        Progress("The model's answer", unit="tokens", total=settings.max_new_tokens, shown=False) as bar,
    ):
        for _ in range(settings.max_new_tokens):
            output = model.module(input_ids=inputs, past_key_values=past, use_cache=True)
            past = output.past_key_values
            logits = output.logits[:, -1].float().cpu()  # [samples, vocabulary]
            chosen = _chosen(logits[:, : model.vocabulary], settings, generators)
            log_probabilities = logits.log_softmax(dim=1)
            for row, (answer, token) in enumerate(zip(answers, chosen.tolist(), strict=True)):
                answer.add(token, float(log_probabilities[row, token].exp()), ends)
            bar.advance(1)
            if all(answer.ended for answer in answers):
                break
            inputs = chosen[:, None].to(model.device)
    return [answer.generation(prompt) for answer in answers]


class _Answer:
    """One answer in the making."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: tuple[int, ...], settings: GenerationSettings) -> None:
        self._tokenizer = tokenizer
        self._prompt_ids = prompt_ids
        self._stop = settings.stop
        self._token_ids: list[int] = []
        self._texts: list[str] = []
        self._probabilities: list[float] = []
        self.ended = False

    def add(self, token: int, probability: float, ends: frozenset[int]) -> None:
        """Take a token, unless the answer has ended or ends before it."""
        if self.ended or token in ends:
            self.ended = True
            return
        token_ids = [*self._prompt_ids, *self._token_ids, token]
        _, text = token_texts(token_ids, len(self._prompt_ids), self._tokenizer)
        before = self._texts[-1] if self._texts else ""
        if self._stop == "line" and before.strip() and text[len(before) :].lstrip(" ").startswith(("\n", "\r")):
            self.ended = True
            return
        self._token_ids.append(token)
        self._texts.append(text)
        self._probabilities.append(probability)
        # A token of text and a line break, such as ".\n", is kept whole, and is the last.
        self.ended = self._stop == "line" and "\n" in text.lstrip()

    def generation(self, prompt: str) -> Generation:
        """The answer, each token with its span."""
        text = self._texts[-1] if self._texts else ""
        tokens, start = [], 0
        for token, decoded, probability in zip(self._token_ids, self._texts, self._probabilities, strict=True):
            # A token ends where its decoded text departs from the whole: at a character with bytes
            # still to come.
            pairs = enumerate(zip(decoded, text, strict=False))
            agreeing = next((position for position, (one, other) in pairs if one != other), len(decoded))
            stop = max(start, min(agreeing, len(text)))
            tokens.append(GeneratedToken(token_id=token, start=start, stop=stop, probability=probability))
            start = stop
        if tokens:  # an answer that ends within a character
            tokens[-1] = dataclasses.replace(tokens[-1], stop=len(text))
        return Generation(prompt=prompt, text=text, prompt_ids=self._prompt_ids, tokens=tuple(tokens))


def _check_prompt(
    model: LanguageModel, prompt_ids: Sequence[int], settings: GenerationSettings, query_id: str | None
) -> None:
    wrong = next((token for token in prompt_ids if not 0 <= token < model.vocabulary), None)
    if wrong is not None:
        name = "prompt" if query_id is None else f"query {query_id}"
        raise missing_embedding(name, wrong, model.vocabulary, model.tokenizer)
    count, room = len(prompt_ids), settings.max_new_tokens
    if not prompt_ids or count + room > model.context_tokens:
        name = "`prompt`" if query_id is None else f"query {one_line(query_id)}"
        raise OptionError(
            f"{name}: expected at least 1 token and room for {abridged(room)} more in the model's "
            f"{model.context_tokens}, found a prompt of {count}; shorten the prompt, or pass a smaller `max_new_tokens`"
        )


def _end_tokens(model: LanguageModel) -> frozenset[int]:
    """Tokens that end an answer: the tokenizer's, and those of the model's generation settings."""
    settings = getattr(model.module, "generation_config", None)
    named = getattr(settings, "eos_token_id", None)
    ends = named if isinstance(named, list) else [named]
    return frozenset(
        token for token in (*ends, model.tokenizer.eos_token_id, model.tokenizer.pad_token_id) if isinstance(token, int)
    )


def _generator(seed: int, prompt_ids: Sequence[int], number: int) -> torch.Generator:
    drawn = draw_bytes(repr(list(prompt_ids)).encode(), key=f"trackstar answer {seed} {number}", bits=64)
    return torch.Generator().manual_seed(int.from_bytes(drawn, "little") >> 1)


def _chosen(
    logits: Float[Tensor, "samples vocabulary"], settings: GenerationSettings, generators: list[torch.Generator]
) -> Int64[Tensor, "samples"]:
    if settings.temperature == 0:
        return logits.argmax(dim=1)
    probabilities = (logits / settings.temperature).softmax(dim=1)
    if settings.top_p < 1:
        ordered, places = probabilities.sort(dim=1, descending=True)
        ordered[ordered.cumsum(dim=1) - ordered >= settings.top_p] = 0  # the first is always kept
        probabilities = torch.zeros_like(probabilities).scatter_(1, places, ordered)
    drawn = [torch.multinomial(row, 1, generator=one) for row, one in zip(probabilities, generators, strict=True)]
    return torch.cat(drawn)
