"""The paper's Eq. 1-4 in float64 by brute force: the slow, obvious version that everything fast is tested against.

It imports nothing of trackstar. Gradients are full matrices from autograd, one example at a time; projections are
dense Kronecker products; nothing is batched, folded, factored or approximated. Names are design.md's:

    G           loss gradient of one weight matrix, [rows = outputs, columns = inputs]      loss_gradients
    V           second moment of one weight matrix, same shape as G                         *_second_moment
    P₀, P₁      left and right projection of one matrix, [side, rows] and [side, columns]   project
    φ           projected gradient of one layer block, [side²]                              projected_gradient
    R           autocorrelation of one layer block, [side², side²]                          autocorrelation
    λ           mixing                                                                      paper_mixing
    influence   Eq. 1-2                                                                     influences

Paper: Chang, Rajagopal, Bolukbasi, Dixon, Tenney, *Scalable Influence and Fact Tracing for Large Language Model
Pretraining*, ICLR 2025 (arXiv 2410.17413).
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Output = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Logits [tokens, vocabulary], token ids [tokens] and target mask [tokens] to the scalar that is differentiated."""


# ---- What is differentiated ----------------------------------------------------------------------------------


def target_log_probabilities(logits: Tensor, token_ids: Tensor, target_mask: Tensor) -> Tensor:
    """log p(token t | tokens before t) of every target token t, [targets], in nats."""
    positions = [t for t in range(len(token_ids)) if target_mask[t]]
    if 0 in positions:
        raise ValueError("the first token has nothing before it and cannot be a target")
    return torch.stack([torch.log_softmax(logits[t - 1], dim=-1)[token_ids[t]] for t in positions])


def loss_output(logits: Tensor, token_ids: Tensor, target_mask: Tensor) -> Tensor:
    """The paper's choice: the *sum* of the target tokens' cross-entropies, in nats."""
    return -target_log_probabilities(logits, token_ids, target_mask).sum()


def margin_output(logits: Tensor, token_ids: Tensor, target_mask: Tensor) -> Tensor:
    """TRAK's output function, log(p / (1 - p)), summed over the target tokens."""
    log_p = target_log_probabilities(logits, token_ids, target_mask)
    return (log_p - torch.log1p(-log_p.exp())).sum()


def logit_output(logits: Tensor, token_ids: Tensor, target_mask: Tensor) -> Tensor:
    """The target tokens' own logits, summed."""
    return torch.stack([logits[t - 1, token_ids[t]] for t in range(len(token_ids)) if target_mask[t]]).sum()


class _EverythingInDouble(TorchFunctionMode):
    """Where a model's code asks for float32 (softmax, norms, rotary angles), it gets float64."""

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        double = [torch.float64 if value is torch.float32 else value for value in args]
        named = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*double, **named)


def double_copy(model: nn.Module) -> nn.Module:
    """The same model in float64, in evaluation mode, with the plain ("eager") attention written out in full."""
    duplicate = copy.deepcopy(model).double().eval().requires_grad_(False)
    if hasattr(duplicate, "set_attn_implementation"):
        duplicate.set_attn_implementation("eager")  # pyright: ignore[reportCallIssue]
    if any("Experts" in type(child).__name__ for child in duplicate.modules()):
        duplicate.set_experts_implementation("eager")  # pyright: ignore[reportCallIssue]
    return duplicate


@contextlib.contextmanager
def _requiring_grad(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    for parameter in parameters:
        parameter.requires_grad_(True)
    yield
    for parameter in parameters:
        parameter.requires_grad_(False)


def output_value(
    double_model: nn.Module, token_ids: Tensor, target_mask: Tensor, *, output: Output = loss_output
) -> Tensor:
    """The output function of one unpadded example under a model made by `double_copy`."""
    with _EverythingInDouble():
        logits = double_model(input_ids=token_ids.long()[None], use_cache=False).logits[0]
    return output(logits, token_ids.long(), target_mask)


def loss_gradients(
    double_model: nn.Module,
    token_ids: Tensor,
    target_mask: Tensor,
    parameter_names: Sequence[str],
    *,
    output: Output = loss_output,
) -> dict[str, Tensor]:
    """∇Loss(z) of Eq. 1-2 for the named weight matrices, each [rows = outputs, columns = inputs], by autograd.

    `double_model` comes from `double_copy`. GPT-2's Conv1D keeps its weight as [inputs, outputs]: its gradient is
    transposed.
    """
    parameters = [double_model.get_parameter(name) for name in parameter_names]
    with _requiring_grad(parameters):
        value = output_value(double_model, token_ids, target_mask, output=output)
        gradients = torch.autograd.grad(value, parameters)
    return {
        name: gradient.T.contiguous() if stored_transposed(double_model, name) else gradient
        for name, gradient in zip(parameter_names, gradients, strict=True)
    }


def stored_transposed(model: nn.Module, parameter_name: str) -> bool:
    """Whether the parameter is a Conv1D's weight, stored as [inputs, outputs]."""
    module = model.get_submodule(parameter_name.rpartition(".")[0])
    return type(module).__name__ == "Conv1D"


# ---- V: second moments ---------------------------------------------------------------------------------------


def adam_second_moment(exp_avg_sq: Tensor, step: int, beta2: float) -> Tensor:
    """Adam's v̂ = v / (1 - β₂ᵗ) (Kingma and Ba, Algorithm 1)."""
    return exp_avg_sq.double() / (1 - beta2**step)


def adafactor_second_moment(exp_avg_sq_row: Tensor, exp_avg_sq_col: Tensor) -> Tensor:
    """Transformers' Adafactor: V = r cᵀ / mean(r), r and c the running *means* over columns and over rows.

    With the sums of Shazeer and Stern (Algorithm 4), R = m·r, C = n·c, it is R Cᵀ / ΣR: the same number.
    """
    r, c = exp_avg_sq_row.double(), exp_avg_sq_col.double()
    return torch.outer(r, c) / r.mean()


def torch_adafactor_second_moment(row_var: Tensor, col_var: Tensor, *, epsilon1: float) -> Tensor:
    """torch.optim.Adafactor: V = max(row_var col_var / max(mean(row_var), ε₁), ε₁²), as its step divides by √V."""
    r, c = row_var.double(), col_var.double()  # [rows, 1], [1, columns]
    return ((r @ c) / r.mean().clamp(min=epsilon1)).clamp(min=epsilon1**2)


def mean_squared_gradient(gradients: Sequence[Tensor]) -> Tensor:
    """V estimated where there is no optimizer state: E[G²] elementwise, the mean over a sample of examples."""
    total = torch.zeros_like(gradients[0])
    for gradient in gradients:
        total += gradient**2
    return total / len(gradients)


def factored_second_moment(second_moment: Tensor) -> Tensor:
    """Adafactor's rank-one form of an elementwise V: r cᵀ / mean(r), r its row means, c its column means."""
    return adafactor_second_moment(second_moment.mean(dim=1), second_moment.mean(dim=0))


def corrected_gradient(gradient: Tensor, second_moment: Tensor | None, *, floor: float = 0.0) -> Tensor:
    """∇Loss(z)/√V of Eq. 2, elementwise; entries of V below `floor` count as `floor`. None is V = 1."""
    if second_moment is None:
        return gradient
    return gradient / second_moment.double().clamp(min=floor).sqrt()


# ---- P: projection (Eq. 4) -----------------------------------------------------------------------------------


def project(gradient: Tensor, left_projection: Tensor, right_projection: Tensor) -> Tensor:
    """vec(P₀ G P₁ᵀ) = (P₀ ⊗ P₁) vec(G) with vec by rows (Eq. 4), [side²], by the dense Kronecker product."""
    dense = torch.kron(left_projection.double(), right_projection.double())  # [side², rows·columns]
    return dense @ gradient.reshape(-1)


def projected_gradient(
    gradients: Sequence[Tensor], left_projections: Sequence[Tensor], right_projections: Sequence[Tensor]
) -> Tensor:
    """φ of one layer block: the sum of its matrices' projected gradients, [side²]."""
    pairs = zip(gradients, left_projections, right_projections, strict=True)
    return torch.stack([project(gradient, left, right) for gradient, left, right in pairs]).sum(dim=0)


def projected_block_diagonal(
    gradients: Sequence[Tensor], left_projections: Sequence[Tensor], right_projections: Sequence[Tensor]
) -> Tensor:
    """φ of one layer block as the paper words it: the block-diagonal concatenation of its matrices, projected."""
    left = torch.cat([left.double() for left in left_projections], dim=1)  # [side, all rows]
    right = torch.cat([right.double() for right in right_projections], dim=1)  # [side, all columns]
    return (left @ torch.block_diag(*gradients) @ right.T).reshape(-1)


def gaussian_projection(side: int, size: int, generator: torch.Generator) -> Tensor:
    """P₀ or P₁ of Eq. 4, [side, size]: entries N(0, *variance* 1/√d), √d the side."""
    return torch.randn(side, size, generator=generator, dtype=torch.float64) / math.sqrt(side)


# ---- R: autocorrelation, mixing (Eq. 3), whitening -----------------------------------------------------------


def autocorrelation(phi: Tensor) -> Tensor:
    """R of one layer block: the *mean* over examples of φφᵀ; phi is [examples, dim], R [dim, dim]."""
    total = torch.zeros(phi.shape[1], phi.shape[1], dtype=torch.float64)
    for row in phi.double():
        total += torch.outer(row, row)
    return total / len(phi)


def mix(evaluation: Tensor, training: Tensor, mixing: float, *, damping: float = 0.0) -> Tensor:
    """R = λ R_eval + (1-λ)(R_train + cI) of one block, c = damping · tr(R_train) / dim (Eq. 3 without damping)."""
    ridge = damping * training.trace() / len(training) * torch.eye(len(training), dtype=training.dtype)
    return mixing * evaluation + (1 - mixing) * (training + ridge)


def mixing_rank(dimensions: int) -> int:
    """k of the λ rule: the paper's 1000 of 65,536 dimensions, in proportion, at least 1."""
    return max(1, round(1000 / 65536 * dimensions))


def pooled_singular_values(blocks: Sequence[Tensor]) -> Tensor:
    """The singular values of all blocks together, descending."""
    return torch.cat([torch.linalg.svdvals(block.double()) for block in blocks]).sort(descending=True).values


def paper_mixing(evaluation: Sequence[Tensor], training: Sequence[Tensor]) -> float:
    """λ at which the k-th largest pooled singular values of λ R_eval and (1-λ) R_train are equal.

    λ s_eval = (1-λ) s_train, hence λ = s_train / (s_eval + s_train).
    """
    k = mixing_rank(sum(len(block) for block in training))
    s_eval = float(pooled_singular_values(evaluation)[k - 1])
    s_train = float(pooled_singular_values(training)[k - 1])
    return s_train / (s_eval + s_train)


def whitening(R: Tensor, *, damping: float = 0.0) -> Tensor:
    """Symmetric R^(-1/2) of one block; `damping` times the mean eigenvalue is added to every eigenvalue."""
    eigenvalues, vectors = torch.linalg.eigh(R.double())
    damped = eigenvalues + damping * eigenvalues.mean()
    if float(damped.min()) <= 0:
        raise ValueError(f"the smallest damped eigenvalue is {float(damped.min()):.3g}, not positive")
    return vectors @ torch.diag(damped**-0.5) @ vectors.T


# ---- Influence (Eq. 1-2) -------------------------------------------------------------------------------------


def whitened(phi: Mapping[str, Tensor], whitenings: Mapping[str, Tensor] | None) -> Tensor:
    """G(z) = R^(-1/2) φ(z), block by block and concatenated in the mapping's order, [examples, all dimensions]."""
    blocks = [
        block.double() if whitenings is None else block.double() @ whitenings[name]  # R^(-1/2) is symmetric
        for name, block in phi.items()
    ]
    return torch.cat(blocks, dim=1)


def influences(
    queries: Mapping[str, Tensor],
    candidates: Mapping[str, Tensor],
    whitenings: Mapping[str, Tensor] | None = None,
    *,
    unit_norm: bool = True,
) -> Tensor:
    """Ḡ(z_q)·Ḡ(z_m) of Eq. 1-2 for every query and candidate, [queries, candidates].

    Both mappings go from a layer block's name to φ, [examples, dim]. Without whitenings or unit norm: the ablations.
    """
    G_queries, G_candidates = whitened(queries, whitenings), whitened(candidates, whitenings)
    scores = torch.empty(len(G_queries), len(G_candidates), dtype=torch.float64)
    for q, G_q in enumerate(G_queries):
        for m, G_m in enumerate(G_candidates):
            norm = float(G_q.norm() * G_m.norm()) if unit_norm else 1.0
            scores[q, m] = G_q @ G_m / norm
    return scores


def top_proponents(scores: Sequence[float], k: int) -> list[int]:
    """The k candidates of the most positive influence, best first; the lower index first among equals."""
    return sorted(range(len(scores)), key=lambda m: (-float(scores[m]), m))[:k]


def top_opponents(scores: Sequence[float], k: int) -> list[int]:
    """The k candidates of the most negative influence, most negative first; the lower index first among equals."""
    return sorted(range(len(scores)), key=lambda m: (float(scores[m]), m))[:k]


# ---- Attribution metrics -------------------------------------------------------------------------------------


def mean_reciprocal_rank(rankings: Sequence[Sequence[int]], relevant: Sequence[set[int]]) -> float:
    """Mean over queries of 1 / rank of the first relevant candidate, ranks from 1; 0 where none is ranked."""
    reciprocal = []
    for ranking, wanted in zip(rankings, relevant, strict=True):
        ranks = [rank for rank, candidate in enumerate(ranking, start=1) if candidate in wanted]
        reciprocal.append(1 / ranks[0] if ranks else 0.0)
    return sum(reciprocal) / len(reciprocal)


def recall_at(k: int, rankings: Sequence[Sequence[int]], relevant: Sequence[set[int]]) -> float:
    """Share of the queries that have at least one relevant candidate among their first k."""
    hits = [bool(set(ranking[:k]) & wanted) for ranking, wanted in zip(rankings, relevant, strict=True)]
    return sum(hits) / len(hits)
