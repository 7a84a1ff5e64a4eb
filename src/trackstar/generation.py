"""What the model itself says after a prompt, so that it can be attributed."""

import torch

from trackstar.errors import OptionError
from trackstar.examples import prompt_tokens
from trackstar.model import LanguageModel


@torch.no_grad()
def generate(model: LanguageModel, prompt: str, *, max_new_tokens: int = 16) -> str:
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
            f"--prompt: has {len(token_ids)} tokens, expected at least 1 and room for {max_new_tokens} more in the "
            f"model's {model.context_tokens}"
        )
    said: list[int] = []
    ends = {token for token in (model.tokenizer.eos_token_id, model.tokenizer.pad_token_id) if token is not None}
    past = None
    inputs = torch.tensor([token_ids], device=model.device)
    for _ in range(max_new_tokens):
        output = model.module(input_ids=inputs, past_key_values=past, use_cache=True)
        past = output.past_key_values
        token = int(output.logits[0, -1].argmax())
        if token in ends:
            break
        said.append(token)
        text = model.tokenizer.decode(said, skip_special_tokens=True)
        if "\n" in text.strip("\n"):
            break
        inputs = torch.tensor([[token]], device=model.device)
    text = model.tokenizer.decode(said, skip_special_tokens=True).strip()
    return text.split("\n", 1)[0].rstrip()
