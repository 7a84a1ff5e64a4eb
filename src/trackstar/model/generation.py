"""What the model itself says after a prompt, token by token, so that it or any part of it can be attributed."""

import dataclasses

import torch

from trackstar.corpus import prompt_tokens
from trackstar.errors import OptionError
from trackstar.model.language_model import LanguageModel
from trackstar.progress import Progress


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SaidToken:
    """One token that the model said.

    Attributes:
        start: Where it begins in the text, in characters.
        stop: Where it ends; `start` where it is white space that the text has lost at its ends.
        probability: The model's, after all that comes before.
    """

    start: int
    stop: int
    probability: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What the model said.

    Attributes:
        text: Without white space at its ends.
        tokens: Its tokens, in order; their ranges do not overlap.
    """

    text: str
    tokens: tuple[SaidToken, ...]


def generate(model: LanguageModel, prompt: str, *, max_new_tokens: int = 16) -> str:
    """The text of `generate_tokens`."""
    return generate_tokens(model, prompt, max_new_tokens=max_new_tokens).text


@torch.no_grad()
def generate_tokens(model: LanguageModel, prompt: str, *, max_new_tokens: int = 16) -> Generation:
    """What the model itself says after the prompt, greedily, up to the end of the text or line.

    Special tokens stand before the prompt as in training; no chat template is applied.

    Args:
        model: The model.
        prompt: What it reads.
        max_new_tokens: Most tokens that it says.

    Raises:
        OptionError: The prompt leaves no room in the model's context, or nothing stands before the first token.
    """
    token_ids = prompt_tokens(prompt, model.tokenizer)
    if not token_ids or len(token_ids) + max_new_tokens > model.context_tokens:
        raise OptionError(
            f"prompt: found {len(token_ids)} tokens, expected at least 1 and room for {max_new_tokens} more in the "
            f"model's {model.context_tokens}"
        )
    said: list[int] = []
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
            said.append(token)
            probabilities.append(float(logits.softmax(0)[token]))
            texts.append(model.tokenizer.decode(said, skip_special_tokens=True))
            bar.advance(1)
            if "\n" in texts[-1].strip("\n"):
                break
            inputs = torch.tensor([[token]], device=model.device)
    return _generation(texts, probabilities)


def _generation(texts: list[str], probabilities: list[float]) -> Generation:
    """The answer from what was decoded after each token."""
    whole = texts[-1] if texts else ""
    text = whole.strip().split("\n", 1)[0].rstrip()
    first = len(whole) - len(whole.lstrip())
    tokens, start = [], 0
    for decoded, probability in zip(texts, probabilities, strict=True):
        # Of a character whose bytes are not all there yet, nothing agrees with the whole.
        agreed = next((at for at, (a, b) in enumerate(zip(decoded, whole, strict=False)) if a != b), len(decoded))
        stop = max(start, min(agreed - first, len(text)))
        tokens.append(SaidToken(start=start, stop=stop, probability=probability))
        start = stop
    return Generation(text=text, tokens=tuple(tokens))
