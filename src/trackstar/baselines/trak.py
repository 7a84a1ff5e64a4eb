"""TRAK (Park et al. 2023) with one model, as published and with R over tokens (paper, Table 2 and
§5.3).

With φ the projected gradients of the multi-class margin f = log(p/(1-p)), and Φ their matrix with
one row per candidate,

    score(q, m) = φ_q (ΦᵀΦ)⁻¹ φ_m · (1 - p̄_m)

where p̄_m is the mean probability of the candidate's target tokens. The factor 1 - p̄_m is Q in the
TRAK paper: the derivative of the loss with respect to the margin. There is no V, no unit norm and
no mixing. Over candidates, (ΦᵀΦ)⁻¹ is R_train⁻¹ up to a factor.

With R over tokens, R is the mean of φφᵀ over single target tokens: the Gauss-Newton matrix of a
language model, whose loss is a sum over tokens. One target token is drawn per candidate.

With the kernel of a pool, Φ has a row for each of the n candidates that a query is compared with,
and for no other. R of n rows has rank n at most, so the system is solved for n unknowns: with
K = ΦΦᵀ in one layer block, and c the ridge added to R = ΦᵀΦ/n,

    Φ (ΦᵀΦ/n + cI)⁻¹ φ_q = n (K + ncI)⁻¹ Φφ_q
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from trackstar.baselines.gradients import GradientMethod, IndexedGradients, check_index
from trackstar.corpus import Query, TokenizedExample
from trackstar.corpus.digests import draw_bytes
from trackstar.curvature.autocorrelation import Autocorrelation
from trackstar.curvature.task import train_autocorrelation
from trackstar.curvature.whitening import shrinkage_damping, shrinkage_of_traces, whitening
from trackstar.errors import CurvatureError
from trackstar.gradients.projector import GradientProjector
from trackstar.gradients.second_moment import NO_SECOND_MOMENT
from trackstar.model.batching import Batch, check_token_ids, make_batch, plan_batches, run_adaptively
from trackstar.model.devices import float64_device, in_float64
from trackstar.model.language_model import LanguageModel
from trackstar.progress import Progress
from trackstar.retrieval.scoring import Scorer, all_scores
from trackstar.store import Index, have_shapes

TRAK = GradientMethod(name="TRAK", second_moment=False, correction="train", unit_norm=False, output="margin")


class TRAKRetriever:
    """TRAK on an index of margin gradients without V.

    Args:
        gradients: The index, with its model.
        per: Whether R is a mean over `examples`, as published, or over single `tokens`.
        damping: Ridge added to R, as a fraction of its mean eigenvalue per block; None is chosen by
            `shrinkage_damping`.
        seed: Seed of the drawn tokens.
        batch_tokens: Most tokens per batch, padding included.

    Raises:
        IndexMismatchError: The index does not hold margin gradients without V.
    """

    def __init__(
        self,
        gradients: IndexedGradients,
        *,
        per: Literal["examples", "tokens"] = "examples",
        damping: float | None = None,
        seed: int = 0,
        batch_tokens: int = 2048,
    ) -> None:
        check_index(gradients.index, TRAK)
        self._gradients = gradients
        self._per: Literal["examples", "tokens"] = per
        self._damping = damping
        self._seed = seed
        self._batch_tokens = batch_tokens

    @property
    def name(self) -> str:
        """The method's name in tables."""
        return "TRAK" if self._per == "examples" else "TRAK, R over tokens"

    def scores(self, queries: Sequence[Query]) -> Float[Tensor, "queries candidates"]:
        """See `Retriever.scores`."""
        index, model, progress = self._gradients.index, self._gradients.model, self._gradients.progress
        phi = self._gradients.phi_of(queries)
        if self._per == "examples":
            r, count = train_autocorrelation(index).square(), index.rows
        else:
            r, count = token_autocorrelation(
                index, model, seed=self._seed, batch_tokens=self._batch_tokens, progress=progress
            )
        damping = shrinkage_damping(r, count) if self._damping is None else self._damping
        names = [block.name for block in index.manifest.layer_blocks]
        vectors = whitening(r, damping=damping, names=names).apply_inverse(phi)
        probabilities = mean_target_probabilities(index, model, batch_tokens=self._batch_tokens, progress=progress)
        return all_scores(index, Scorer(vectors=vectors, multipliers=1 - probabilities))

    def scores_by_kernels_of_pools(
        self, queries: Sequence[Query], pools: Sequence[Int64[np.ndarray, "_"]]
    ) -> list[Float[Tensor, "_"]]:
        """Scores of the candidates of each query's own pool, with (ΦᵀΦ)⁻¹ over that pool.

        Args:
            queries: The queries.
            pools: Rows of each query's pool, ascending. Time and memory grow with the square of
                their number.

        Raises:
            CurvatureError: A pool's kernel is singular; the message names the query.
        """
        index, model, progress = self._gradients.index, self._gradients.model, self._gradients.progress
        phi = self._gradients.phi_of(queries)
        blocks = len(index.manifest.layer_blocks)
        probabilities = mean_target_probabilities(index, model, batch_tokens=self._batch_tokens, progress=progress)
        scores = []
        with Progress("TRAK with kernels of pools", unit="pools", total=len(pools), shown=progress) as bar:
            for query, query_phi, rows in zip(queries, phi, pools, strict=True):
                pool_phi = index.some_rows(rows.tolist()).decode().to(query_phi)
                try:
                    products = kernel_products(
                        pool_phi.reshape(len(rows), blocks, -1), query_phi.reshape(blocks, -1), damping=self._damping
                    )
                except CurvatureError as error:
                    raise CurvatureError(f"query {query.query_id}: {error}") from None
                scores.append(products.float().cpu() * (1 - probabilities[torch.from_numpy(rows)]))
                bar.advance(1)
        return scores


def kernel_products(
    pool: Float[Tensor, "pool blocks dim"], query: Float[Tensor, "blocks dim"], *, damping: float | None = None
) -> Float64[Tensor, "pool"]:
    """Φ R⁻¹ φ_q summed over layer blocks, with R the mean of φφᵀ over the pool, plus cI.

    Args:
        pool: φ of the pool's candidates.
        query: φ of the query.
        damping: c, as a fraction of the mean eigenvalue of each block of R; None is chosen by
            shrinkage for as many examples as the pool has.

    Raises:
        CurvatureError: R of a block is singular.
    """
    count, _, dim = pool.shape
    kernels = [in_float64(block @ block.T) for block in pool.unbind(1)]  # n × n each
    traces = [float(kernel.diagonal().sum()) / count for kernel in kernels]  # tr R = tr K / n, tr R² = ‖K‖² / n²
    if damping is None:
        pairs = [
            (trace, float(kernel.square().sum()) / count**2) for trace, kernel in zip(traces, kernels, strict=True)
        ]
        damping = shrinkage_of_traces(pairs, dim=dim, examples=count)
    total = torch.zeros(count, dtype=torch.float64, device=float64_device(pool.device))
    for number, (kernel, trace) in enumerate(zip(kernels, traces, strict=True)):
        kernel.diagonal().add_(count * damping * trace / dim)
        root, failed = torch.linalg.cholesky_ex(kernel)
        if failed or not trace > 0:
            raise CurvatureError(
                f"block {number}: R of the pool's {count} candidates is singular with damping {damping:g}; pass more "
                "damping, such as `damping=0.1`"
            )
        products = in_float64(pool[:, number] @ query[number])
        total += count * torch.cholesky_solve(products[:, None], root)[:, 0]
    return total


@torch.no_grad()
def mean_target_probabilities(
    index: Index, model: LanguageModel, *, batch_tokens: int = 2048, progress: bool = False
) -> Float[Tensor, "candidates"]:
    """p̄: mean probability of each candidate's target tokens; one forward pass, saved with the index."""
    saved = index.load_derived("mean-target-probabilities")
    if have_shapes(saved, probabilities=(index.rows,)):
        return saved["probabilities"]
    examples = [stored.example for stored in index.examples()]
    probabilities = torch.empty(len(examples))

    def run(rows: list[int]) -> Tensor:
        return _mean_probabilities(model, make_batch(examples, rows, device=model.device))

    with Progress("Probabilities of candidates", unit="examples", total=len(examples), shown=progress) as bar:
        check_token_ids(examples, model.vocabulary, model.tokenizer)
        plan = plan_batches([len(example.token_ids) for example in examples], model.batch_budget(batch_tokens))
        for rows, means in run_adaptively(plan, run, bar.note):
            probabilities[torch.tensor(rows)] = means.cpu()
            bar.advance(len(rows))
    index.save_derived("mean-target-probabilities", {"probabilities": probabilities})
    return probabilities


def _mean_probabilities(model: LanguageModel, batch: Batch) -> Float[Tensor, "batch"]:
    with model.frozen():
        hidden = model.hidden_states(batch.token_ids)  # (batch, tokens, width)
    # The hidden state at a position predicts the next token.
    example, position = batch.target_mask[:, 1:].nonzero(as_tuple=True)
    targets = batch.token_ids[example, position + 1]
    sums = torch.zeros(len(batch.indices), device=hidden.device)
    for part in torch.arange(len(targets), device=hidden.device).split(256):
        log_probabilities = torch.log_softmax(model.head.logits(hidden[example[part], position[part]]).float(), dim=-1)
        target_probabilities = log_probabilities.gather(1, targets[part, None])[:, 0].exp()
        sums.index_add_(0, example[part], target_probabilities)
    return sums / batch.target_mask.sum(dim=1)


def token_autocorrelation(
    index: Index, model: LanguageModel, *, seed: int = 0, batch_tokens: int = 2048, progress: bool = False
) -> tuple[Float[Tensor, "blocks dim dim"], int]:
    """R over single tokens, and their number.

    R is the mean of φφᵀ, with φ the gradient of the margin of one target token per candidate. It
    costs about half a pass over the corpus and is saved with the index.
    """
    name = f"token-autocorrelation-{seed}"
    saved = index.load_derived(name)
    manifest = index.manifest
    dim = manifest.projection.side**2
    if have_shapes(saved, autocorrelation=(len(manifest.layer_blocks), dim, dim)):
        return saved["autocorrelation"], index.rows
    examples = [_with_one_target(stored.example, seed) for stored in index.examples()]
    sums = Autocorrelation(len(manifest.layer_blocks), manifest.projection.side**2, device=float64_device(model.device))
    with (
        Progress("R over tokens", unit="tokens", total=len(examples), shown=progress) as bar,
        GradientProjector(
            model,
            NO_SECOND_MOMENT,
            seed=manifest.projection.seed,
            side=manifest.projection.side,
            batch_tokens=batch_tokens,
            note=bar.note,
            output=manifest.output,
            kind=manifest.projection.kind,
        ) as projector,
    ):
        pending: list[Tensor] = []
        for rows, phi, _ in projector.batches(examples):
            pending.append(phi)
            if sum(map(len, pending)) >= 256:  # adding a few rows costs as much as adding many
                sums.add(torch.cat(pending))
                pending = []
            bar.advance(len(rows))
        if pending:
            sums.add(torch.cat(pending))
    mean = sums.mean().cpu()
    index.save_derived(name, {"autocorrelation": mean})
    return mean, len(examples)


def _with_one_target(example: TokenizedExample, seed: int) -> TokenizedExample:
    """The example up to one of its targets, drawn by seed and id, which becomes its only target."""
    targets = np.flatnonzero(example.target_mask)
    drawn = draw_bytes(f"{seed} {example.example_id}".encode(), bits=64)
    chosen = int(targets[int.from_bytes(drawn, "little") % len(targets)])
    target_mask = np.zeros(chosen + 1, dtype=bool)
    target_mask[chosen] = True
    return dataclasses.replace(example, token_ids=example.token_ids[: chosen + 1], target_mask=target_mask)
