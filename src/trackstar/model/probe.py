"""Run a few tokens through a model, to find out how it computes and to refuse what cannot be attributed.

Two batches of the same shape are run. Their first examples begin with the same tokens, and all other
tokens differ. What is computed for the shared tokens must not depend on the others.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trackstar.errors import ModelError
from trackstar.model.adapter import unwrapped
from trackstar.model.experts import expert_arguments, expert_outputs, is_experts, routed
from trackstar.model.input_layouts import FLAT, InputLayout, find_layout
from trackstar.text import one_line

BATCH, TOKENS, SHARED = 3, 7, 4


class HeadReached(Exception):  # noqa: N818 - not an error
    """Ends a forward pass at the head, whose input is all that is needed."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """How a model computes.

    Attributes:
        calls: Number of calls in a forward pass of each linear layer and each module of experts, by path;
            those that take no part are missing.
        layouts: Layout of the input of each module that does not read [batch, tokens, columns].
        groups: For each linear layer, the first one with the same input tensor.
        from_base: Whether the head's input is the last hidden state of `base_model`.
        mixes: Whether examples in one batch, or padding, change each other's predictions.
        faults: Modules that compute something else than products with their weights.
        head: Index of the function that the head is.
    """

    calls: Mapping[str, int]
    layouts: Mapping[str, InputLayout]
    groups: Mapping[str, str]
    from_base: bool
    mixes: bool
    faults: frozenset[str]
    head: int


def hidden_states(module: PreTrainedModel, token_ids: Tensor, *, from_base: bool) -> Tensor:
    """The input of a model's head: [batch, tokens, width]."""
    if from_base:
        return module.base_model(input_ids=token_ids, use_cache=False).last_hidden_state
    reached: list[Tensor] = []

    def stop(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
        reached.append(arguments[0])
        raise HeadReached

    handle = _head(module).register_forward_pre_hook(stop)
    try:
        module(input_ids=token_ids, use_cache=False)
    except HeadReached:
        pass
    finally:
        handle.remove()
    return reached[0]


@torch.no_grad()
def probe(module: PreTrainedModel, heads: Sequence[Callable[[Tensor], Tensor]], vocabulary: int, source: str) -> Probe:
    """Run the probes.

    Args:
        module: The model, in evaluation mode.
        heads: Functions from hidden states to logits that the head may be.
        vocabulary: Number of tokens.
        source: The model's name in messages.

    Raises:
        ModelError: The model cannot be run, its logits are not finite or not the head's, or a later
            token changes an earlier prediction.
    """
    device = _head(module).weight.device
    numbers = torch.arange(BATCH * TOKENS, device=device).view(BATCH, TOKENS)
    first = (3 + numbers) % vocabulary
    second = (3 + BATCH * TOKENS + numbers) % vocabulary
    second[0, :SHARED] = first[0, :SHARED]
    one, other = _run(module, first, source), _run(module, second, source)
    head = _matching_head(module, heads, one, source)
    # In bfloat16, an expert may change when the shapes do.
    tolerance = 1e-3 if one.logits.dtype in (torch.float32, torch.float64) else 5e-2
    mixes = not _close(one.logits[0, :SHARED], other.logits[0, :SHARED], tolerance)
    if mixes:
        alone, beside = (_run(module, tokens[:1], source).logits[0, :SHARED] for tokens in (first, second))
        if not _close(alone, beside, tolerance):
            encoder = getattr(module.config, "is_decoder", None) is False
            advice = "set is_decoder to true in its config.json if it was trained as a decoder, or " if encoder else ""
            raise ModelError(
                f"{source}: {type(module).__name__} is not causal: a later token changes the prediction of an earlier "
                f"one; expected a causal language model; {advice}use a model that predicts text from left to right"
            )
    else:
        # Padding changes nothing if a shorter example, alone and without padding, has the same predictions.
        shorter = _run(module, first[:1, :SHARED], source).logits[0]
        mixes = not _close(shorter, one.logits[0, :SHARED], tolerance if tolerance < 1e-2 else 0.25)
    layouts = {}
    for path, tensor in one.inputs.items():
        layout = find_layout(tensor, other.inputs.get(path, tensor), batch=BATCH, tokens=TOKENS, shared=SHARED)
        if layout is not None and is_experts(module.get_submodule(path)) and not layout.is_flattened:
            layout = FLAT  # experts need the examples' tokens one after the other
        if layout is not None:
            layouts[path] = layout
    leaders: dict[int, str] = {}
    return Probe(
        calls=one.calls,
        layouts=layouts,
        groups={path: leaders.setdefault(id(tensor), path) for path, tensor in one.inputs.items()},
        from_base=_from_base(module, first, one.hidden, tolerance),
        mixes=mixes,
        faults=frozenset(one.faults),
        head=head,
    )


@dataclasses.dataclass(slots=True, kw_only=True)
class _Run:
    """What one forward pass computes."""

    logits: Tensor
    hidden: Tensor
    calls: dict[str, int]
    inputs: dict[str, Tensor]
    faults: set[str]


def _run(module: PreTrainedModel, token_ids: Tensor, source: str) -> _Run:
    run = _Run(logits=torch.zeros(0), hidden=torch.zeros(0), calls={}, inputs={}, faults=set())
    head = _head(module)

    def record(path: str) -> Callable[..., None]:
        def hook(child: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
            run.calls[path] = run.calls.get(path, 0) + 1
            if child is head:
                run.hidden = arguments[0].to(output.device)  # Accelerate moves it behind this hook
                return
            if is_experts(child):
                states, indices, weights = expert_arguments(*arguments, *options.values())
                run.inputs[path] = states
                routing = routed(indices, experts=int(child.num_experts), batch=1, tokens=len(states))  # pyright: ignore[reportArgumentType]
                agrees = states.ndim == 2 and _close(expert_outputs(child, states, weights, routing), output, 1e-3)
            else:
                run.inputs[path] = arguments[0]
                agrees = type(child) in (nn.Linear, Conv1D) or _is_linear(child, arguments[0], output)
            if not agrees:
                run.faults.add(path)

        return hook

    with _recorded(module, record):
        try:
            run.logits = module(input_ids=token_ids, use_cache=False).logits
        except Exception as error:
            reason = one_line(error, 300) or type(error).__name__
            raise ModelError(
                f"{source}: {type(module).__name__} cannot be run on a few tokens ({reason}); expected a model that "
                "predicts text from text alone; update transformers, or use another model"
            ) from None
    return run


@contextmanager
def _recorded(module: nn.Module, record: Callable[[str], Callable[..., None]]) -> Iterator[None]:
    handles = [
        child.register_forward_hook(record(path), with_kwargs=True)
        for path, child in module.named_modules()
        if isinstance(child, (nn.Linear, Conv1D)) or is_experts(child)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _head(module: PreTrainedModel) -> Any:
    """The head's linear layer."""
    return unwrapped(module.get_output_embeddings())


def _is_linear(child: nn.Module, inputs: Tensor, output: Any) -> bool:
    bias = child.bias if isinstance(child.bias, Tensor) else None
    weight = child.get_parameter("weight")
    expected = nn.functional.linear(inputs.to(weight.device), weight, bias)
    return isinstance(output, Tensor) and output.shape == expected.shape and _close(expected, output, 1e-3)


def _matching_head(module: PreTrainedModel, heads: Sequence[Callable[[Tensor], Tensor]], run: _Run, source: str) -> int:
    """Index of the first function that gives the model's logits, which must be finite."""
    expected = run.logits.float()
    if not torch.isfinite(expected).all():
        raise ModelError(
            f"{source}: the logits of a few tokens are NaN or infinite, expected finite ones; "
            f"{largest_weight(module)}: its weights are damaged, or too large for the computation's dtype"
        )
    width = _head(module).weight.shape[1]
    if run.hidden.shape != (BATCH, TOKENS, width) or expected.shape[:2] != (BATCH, TOKENS):
        raise ModelError(
            f"{source}: the head of {type(module).__name__} reads a tensor of shape {tuple(run.hidden.shape)} for "
            f"{BATCH} examples of {TOKENS} tokens, expected one vector per token; use another model"
        )
    tolerance = 1e-3 if run.hidden.dtype in (torch.float32, torch.float64) else 5e-2
    differences = []
    for number, logits in enumerate(heads):
        found = logits(run.hidden.flatten(0, 1)).float().view(BATCH, TOKENS, -1).to(expected.device)
        if found.shape == expected.shape:
            if _close(found, expected, tolerance):
                return number
            differences.append(float((found - expected).abs().max()))
    by = f"by {min(differences):.3g}" if differences else "in shape"
    raise ModelError(
        f"{source}: {type(module).__name__} computes logits in a way that trackstar does not support (they differ "
        f"{by} from those of a linear head); please report this architecture"
    )


def _from_base(module: PreTrainedModel, token_ids: Tensor, hidden: Tensor, tolerance: float) -> bool:
    try:
        found = hidden_states(module, token_ids, from_base=True)
    except Exception:  # a base model that needs more than tokens, or is the model itself
        return False
    return found.shape == hidden.shape and _close(found.to(hidden.device), hidden, tolerance)


def _close(first: Tensor, second: Tensor, tolerance: float) -> bool:
    scale = float(second.abs().max()) if second.numel() else 0.0
    return torch.allclose(first.float(), second.float(), rtol=tolerance, atol=tolerance * scale)


def largest_weight(module: nn.Module) -> str:
    """The largest weight in absolute value, with its parameter, for messages."""
    largest = {name: float(parameter.abs().max()) for name, parameter in module.named_parameters() if parameter.numel()}
    name = max(largest, key=lambda name: largest[name])
    return f"the largest weight is {largest[name]:.3g}, in {name}"
