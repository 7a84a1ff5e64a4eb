"""Greedy generation with each token's span and probability, so that any part of it can be attributed."""

import dataclasses

import torch

from trackstar.corpus import prompt_tokens
from trackstar.errors import OptionError
from trackstar.model.batching import missing_embedding
from trackstar.model.language_model import LanguageModel
from trackstar.progress import Progress


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedToken:
    """One generated token.

    Attributes:
        start: Its first character in the text.
        stop: The character after its last; equal to `start` for white space stripped from the text's ends.
        probability: Its probability given everything before it.
    """

    start: int
    stop: int
    probability: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """The model's output after a prompt.

    Attributes:
        text: Its text, without white space at its ends.
        tokens: Its tokens, in order; their spans do not overlap.
    """

    text: str
    tokens: tuple[GeneratedToken, ...]


def generate(model: LanguageModel, prompt: str, *, max_new_tokens: int = 16) -> str:
    """The text that the model generates greedily after a prompt; see `generate_tokens`."""
    return generate_tokens(model, prompt, max_new_tokens=max_new_tokens).text


@torch.no_grad()
def generate_tokens(model: LanguageModel, prompt: str, *, max_new_tokens: int = 16) -> Generation:
    """Generate greedily after a prompt, up to the end of the text or of the line.

    Special tokens precede the prompt as in training; no chat template is applied.

    Args:
        model: The model.
        prompt: Text to continue.
        max_new_tokens: Most tokens to generate.

    Raises:
        OptionError: The prompt leaves no room in the model's context, or has no token.
        ModelError: A token of the prompt has no embedding.
    """
    token_ids = prompt_tokens(prompt, model.tokenizer)
    wrong = next((token for token in token_ids if not 0 <= token < model.vocabulary), None)
    if wrong is not None:
        raise missing_embedding("prompt", wrong, model.vocabulary, model.tokenizer)
    if not token_ids or len(token_ids) + max_new_tokens > model.context_tokens:
        raise OptionError(
            f"`prompt`: expected at least 1 token and room for {max_new_tokens} more in the model's "
            f"{model.context_tokens}, found {len(token_ids)} tokens; shorten it, or pass a smaller `max_new_tokens`"
        )
    generated: list[int] = []
    texts: list[str] = []
    probabilities: list[float] = []
    ends = {token for token in (model.tokenizer.eos_token_id, model.tokenizer.pad_token_id) if token is not None}
    past = None
    inputs = torch.tensor([token_ids], device=model.device)
    with Progress("The model's answer", unit="tokens", total=max_new_tokens, shown=False) as bar:
        for _ in range(max_new_tokens):
            output = model.module(input_ids=inputs, past_key_values=past, use_cache=True)
            past = output.past_key_values
            logits = output.logits[0, -1].float()
            token = int(logits.argmax())
            if token in ends:
                break
            generated.append(token)
            probabilities.append(float(logits.softmax(0)[token]))
            texts.append(model.tokenizer.decode(generated, skip_special_tokens=True))
            bar.advance(1)
            if "\n" in texts[-1].strip("\n"):
                break
            inputs = torch.tensor([[token]], device=model.device)
    return _generation(texts, probabilities)


def _generation(texts: list[str], probabilities: list[float]) -> Generation:
    """The generation, from the text decoded after each token."""
    whole = texts[-1] if texts else ""
    text = whole.strip().split("\n", 1)[0].rstrip()
    first = len(whole) - len(whole.lstrip())
    tokens, start = [], 0
    for decoded, probability in zip(texts, probabilities, strict=True):
        # A token ends where its decoded text departs from the whole: at a character with bytes still to come.
        pairs = enumerate(zip(decoded, whole, strict=False))
        agreeing = next((position for position, (a, b) in pairs if a != b), len(decoded))
        stop = max(start, min(agreeing - first, len(text)))
        tokens.append(GeneratedToken(start=start, stop=stop, probability=probability))
        start = stop
    return Generation(text=text, tokens=tuple(tokens))
