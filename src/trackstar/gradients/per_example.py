"""Per-example loss gradients as factors: G = Σ_t g_t a_tᵀ, which is never materialized here.

For a matrix W with outputs y_t = W a_t, an example's loss gradient is the sum over token positions
of the outer products of g_t = ∂Loss/∂y_t and a_t. Forward hooks pass each matrix's inputs a to a
`GradientConsumer`, backward hooks pass it the gradients g of the matrix's outputs. Only gradients
of activations are computed: all weights are frozen, and the graph starts at the outputs of the
first matrices.

The gradient of the output head is computed in closed form (for the loss: (softmax - one-hot) W)
over chunks of target positions, so that no tensor of vocabulary size exists for the whole batch.

The loss is what is differentiated; TRAK's margin and the logit exist for comparisons (paper, Table A.3).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TypeVar, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trackstar.choices import Output
from trackstar.corpus import TokenizedExample
from trackstar.errors import GradientError
from trackstar.gradients.consumer import GradientConsumer
from trackstar.gradients.matrix_hooks import matrix_hooks
from trackstar.model.batching import Batch, check_token_ids, make_batch, plan_batches, run_adaptively
from trackstar.model.language_model import Head, LanguageModel
from trackstar.model.probe import largest_weight

# Bytes that the logits of a chunk of positions take: small enough to stay in a last-level cache,
# large enough for an efficient matrix product.
_CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 512 << 20}

Result = TypeVar("Result")


@contextmanager
def gradient_pass(
    model: LanguageModel, consumer: GradientConsumer, *, output: Output = "loss"
) -> Iterator[Callable[[Batch], Float[Tensor, "batch"]]]:
    """Hook the model's matrices, and yield a function that runs a batch forward and backward.

    The function returns each example's loss: the sum of its target tokens' cross-entropies, in nats
    (paper, §3). The consumer receives the gradients of `output`. The model is frozen meanwhile.
    """
    with model.frozen(), matrix_hooks(model, consumer) as hooks:

        def run(batch: Batch) -> Float[Tensor, "batch"]:
            consumer.start(batch)
            hooks.start(batch)
            with torch.enable_grad():
                hidden = model.hidden_states(batch.token_ids)
            if not hidden.requires_grad:
                raise GradientError(
                    f"{model.source}: no gradient passes through {model.architecture}, whose code computes its own "
                    "backward pass; expected layers that torch differentiates; use another model"
                )
            losses, hidden_gradients = loss_and_hidden_gradients(
                model.head, hidden.detach(), batch.token_ids, batch.target_mask, output=output
            )
            hidden.backward(hidden_gradients)
            hooks.finish()
            return losses

        yield run


@final
class BatchedPass:
    """Gradient passes over examples, in batches of similar length that are halved when memory runs out.

    Hooks stay on the model until the pass is closed; use it as a context manager.

    Args:
        model: The model.
        consumer: Receives the factors of the gradients.
        batch_tokens: Most tokens per batch, padding included.
        note: Callback that receives a line when memory runs out and batches become smaller.
        output: The function that is differentiated.
    """

    def __init__(
        self,
        model: LanguageModel,
        consumer: GradientConsumer,
        *,
        batch_tokens: int,
        note: Callable[[str], None],
        output: Output = "loss",
    ) -> None:
        self._model = model
        self._consumer = consumer
        self._batch_tokens = batch_tokens
        self._note = note
        self._output: Output = output
        self._stack = ExitStack()
        self._run: Callable[[Batch], Tensor] | None = None

    def __enter__(self) -> "BatchedPass":
        self._run = self._stack.enter_context(gradient_pass(self._model, self._consumer, output=self._output))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def batches(
        self, examples: Sequence[TokenizedExample], result: Callable[[], Result]
    ) -> Iterator[tuple[list[int], Result, Float[Tensor, "batch"]]]:
        """Run all examples, the longest first.

        Args:
            examples: The examples.
            result: Called after each batch that ran to its end. A tensor that it returns has one
                row per example.

        Yields:
            For each batch, the indices of its examples, its result, and its losses in nats.

        Raises:
            OptionError: `batch_tokens` is not positive, or a single example does not fit in memory.
            GradientError: A loss or a row of the result is not finite; the message names the example.
            ModelError: A token has no embedding; the message names the example and the token.
        """
        assert self._run is not None, "used outside its context"
        run = self._run
        check_token_ids(examples, self._model.vocabulary, self._model.tokenizer)

        def run_batch(indices: list[int]) -> tuple[Result, Tensor]:
            losses = run(make_batch(examples, indices, device=self._model.device))
            return result(), losses

        plan = plan_batches(
            [len(example.token_ids) for example in examples], self._model.batch_budget(self._batch_tokens)
        )
        for indices, (rows, losses) in run_adaptively(plan, run_batch, self._note):
            finite = torch.isfinite(losses)
            if isinstance(rows, Tensor):
                finite = torch.isfinite(rows).all(dim=1) & finite
            if not finite.all():
                row = int(finite.int().argmin())
                raise self._not_finite(examples[indices[row]].example_id, float(losses[row]))
            yield indices, rows, losses

    def _not_finite(self, name: str, loss: float) -> GradientError:
        found = f"its gradient is not finite (its loss is {loss:.4g})" if math.isfinite(loss) else f"its loss is {loss}"
        return GradientError(
            f"{name}: {found}, expected finite numbers; {largest_weight(self._model.module)}; check the model's "
            "weights and V, or leave the example out"
        )


def logits_chunk_bytes(device: torch.device) -> int:
    """Most bytes of the logits that are computed at once on a device."""
    return _CHUNK_BYTES.get(device.type, 64 << 20)


@torch.no_grad()
def loss_and_hidden_gradients(
    head: Head,
    hidden: Float[Tensor, "batch tokens width"],
    token_ids: Int[Tensor, "batch tokens"],
    target_mask: Bool[Tensor, "batch tokens"],
    *,
    output: Output = "loss",
) -> tuple[Float[Tensor, "batch"], Float[Tensor, "batch tokens width"]]:
    """Summed cross-entropies, and gradients of `output` with respect to the head's inputs, in closed form.

    The token at position t + 1 is predicted from the hidden state at t. With logits z and the target y,

        loss    ∂CE/∂z = softmax(z) - onehot(y)
        margin  log(p/(1-p)) = z_y - logsumexp of the others (Park et al. 2023):
                onehot(y) - softmax of the others
        logit   onehot(y)

    A soft cap c multiplies each by 1 - (z/c)².

    Returns:
        Each example's loss in nats, in float32, and the gradients with respect to `hidden`, in its dtype.
    """
    example, position = target_mask[:, 1:].nonzero(as_tuple=True)  # [targets] each
    states = hidden[example, position]  # [targets, width]
    targets = token_ids[example, position + 1]
    losses = torch.zeros(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    gradients = torch.zeros_like(hidden)
    vocabulary = head.weight.shape[0]
    chunk = max(16, logits_chunk_bytes(hidden.device) // (4 * vocabulary))
    for start in range(0, len(targets), chunk):
        part = slice(start, start + chunk)
        cross_entropies, by_states = _output_gradient(head, states[part], targets[part], output)
        losses.index_add_(0, example[part], cross_entropies)
        gradients[example[part], position[part]] = by_states
    return losses, gradients


def _output_gradient(
    head: Head, states: Float[Tensor, "positions width"], targets: Int[Tensor, "positions"], output: Output
) -> tuple[Float[Tensor, "positions"], Float[Tensor, "positions width"]]:
    logits = head.logits(states).float()  # [positions, vocabulary]
    rows = torch.arange(len(targets), device=targets.device)
    # Before the buffer is reused: d(c·tanh(x/c))/dx = 1 - (z/c)².
    cap_slope = None if head.cap is None else 1 - (logits / head.cap).square()
    if output == "loss":
        log_probabilities = torch.log_softmax(logits, dim=-1, out=logits)
        cross_entropies = -log_probabilities[rows, targets]
        by_logits = log_probabilities.exp_()
        by_logits[rows, targets] -= 1.0
    else:
        cross_entropies = torch.logsumexp(logits, dim=-1) - logits[rows, targets]
        if output == "margin":
            logits[rows, targets] = -torch.inf
            by_logits = torch.softmax(logits, dim=-1).neg_()
        else:
            by_logits = torch.zeros_like(logits)
        by_logits[rows, targets] = 1.0
    if cap_slope is not None:
        by_logits *= cap_slope
    by_states = by_logits.to(states.dtype) @ head.weight  # [positions, width]
    return cross_entropies, by_states if head.scale == 1.0 else by_states * head.scale
