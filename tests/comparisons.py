"""The package's objects beside the oracle's: the same tiny model, examples and projections in both."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

import reference
from tiny_models import tiny_model, tiny_tokenizer
from trackstar.corpus import TokenizedExample
from trackstar.gradients.per_example import gradient_pass
from trackstar.gradients.projection import ProjectedGradients, projections
from trackstar.gradients.second_moment import NO_SECOND_MOMENT, SecondMoment
from trackstar.model.batching import make_batch, plan_batches
from trackstar.model.language_model import LanguageModel, wrap_model
from trackstar.model.layer_blocks import LayerBlock, WeightMatrix

SIDE = 4
"""√d of the tests' projections; 16 dimensions a layer block."""


@functools.cache
def language_model(architecture: str, *, layer_blocks: int = 2) -> LanguageModel:
    """A tiny model as the package wraps it."""
    return wrap_model(tiny_model(architecture), tiny_tokenizer("bos"), layer_blocks=layer_blocks)


def random_examples(
    lengths: Sequence[int], *, seed: int = 0, targets_from: int = 1, vocabulary: int = 300
) -> list[TokenizedExample]:
    """Examples of random tokens; every token from `targets_from` on is a target."""
    draw = np.random.default_rng(seed)
    examples = []
    for number, length in enumerate(lengths):
        examples.append(
            TokenizedExample(
                example_id=f"example-{number}",
                parent_id=f"example-{number}",
                record=number,
                window=0,
                text="",
                token_ids=draw.integers(3, vocabulary, length).astype(np.int32),
                target_mask=np.arange(length) >= targets_from,
            )
        )
    return examples


def with_targets(example: TokenizedExample, target_mask: Sequence[bool]) -> TokenizedExample:
    """The same tokens with other targets."""
    return dataclasses.replace(example, target_mask=np.array(target_mask, dtype=bool))


@functools.lru_cache(maxsize=32)
def _double(model_id: int, module: torch.nn.Module) -> torch.nn.Module:
    return reference.double_copy(module)


def reference_gradients(
    model: LanguageModel,
    examples: Sequence[TokenizedExample],
    *,
    output: reference.Output = reference.loss_output,
) -> list[dict[str, Tensor]]:
    """Each example's G of every matrix by its module path, from the oracle."""
    double = _double(id(model.module), model.module)
    gradients = []
    for example in examples:
        named = reference.loss_gradients(
            double,
            torch.from_numpy(example.token_ids),
            torch.from_numpy(example.target_mask),
            sorted({matrix.parameter for matrix in model.matrices}),
            output=output,
        )
        gradients.append({matrix.name: of_matrix(named[matrix.parameter], matrix) for matrix in model.matrices})
    return gradients


def of_matrix(gradient: Tensor, matrix: WeightMatrix) -> Tensor:
    """G of one matrix: the oracle's gradient, or a fused expert's slice of it as [outputs, inputs]."""
    if matrix.expert is None:
        return gradient  # transposed by the oracle
    return gradient[matrix.expert].T if matrix.transposed else gradient[matrix.expert]


def reference_losses(model: LanguageModel, examples: Sequence[TokenizedExample]) -> Tensor:
    """Each example's loss from the oracle, in nats."""
    double = _double(id(model.module), model.module)
    with torch.no_grad():
        return torch.stack(
            [
                reference.output_value(double, torch.from_numpy(e.token_ids), torch.from_numpy(e.target_mask))
                for e in examples
            ]
        )


def reference_phi(
    model: LanguageModel,
    examples: Sequence[TokenizedExample],
    second_moments: Mapping[str, Tensor] | None = None,
    *,
    seed: int = 0,
    side: int = SIDE,
) -> dict[str, Tensor]:
    """φ by layer block, [examples, side²], from the oracle, with the package's P₀ and P₁ and the given V."""
    return reference_phi_of(model, reference_gradients(model, examples), second_moments, seed=seed, side=side)


def reference_phi_of(
    model: LanguageModel,
    gradients: Sequence[Mapping[str, Tensor]],
    second_moments: Mapping[str, Tensor] | None = None,
    *,
    seed: int = 0,
    side: int = SIDE,
) -> dict[str, Tensor]:
    """The same from gradients that are there already."""
    drawn = {matrix.name: projections(matrix, seed=seed, side=side) for matrix in model.matrices}

    def phi(block: LayerBlock, of: Mapping[str, Tensor]) -> Tensor:
        names = [matrix.name for matrix in block.matrices]
        corrected = [reference.corrected_gradient(of[n], second_moments[n] if second_moments else None) for n in names]
        return reference.projected_gradient(corrected, [drawn[n][0] for n in names], [drawn[n][1] for n in names])

    return {block.name: torch.stack([phi(block, of) for of in gradients]) for block in model.blocks}


def package_phi(
    model: LanguageModel,
    examples: Sequence[TokenizedExample],
    second_moment: SecondMoment = NO_SECOND_MOMENT,
    *,
    seed: int = 0,
    side: int = SIDE,
    batch_tokens: int = 256,
    pad_to: int = 0,
) -> Tensor:
    """φ from the package in planned batches, in the examples' order, [examples, dimensions]."""
    consumer = ProjectedGradients(model, second_moment, seed=seed, side=side)
    phi = torch.full((len(examples), consumer.dimensions), torch.nan)
    with gradient_pass(model, consumer) as run:
        for places in plan_batches([max(pad_to, len(e.token_ids)) for e in examples], batch_tokens):
            run(make_batch(examples, places, pad_to=pad_to))
            phi[list(places)] = consumer.result()
    return phi


def by_block(model: LanguageModel, phi: Tensor) -> dict[str, Tensor]:
    """The package's φ split into its layer blocks, [examples, side²] each."""
    parts = phi.chunk(len(model.blocks), dim=1)
    return {block.name: part for block, part in zip(model.blocks, parts, strict=True)}


def assert_rows_close(found: Tensor, expected: Tensor, *, tolerance: float = 1e-4, label: str = "") -> None:
    """Every row of `found` differs from `expected`'s by less than `tolerance` of that row's norm."""
    assert found.shape == expected.shape, f"{label}: {tuple(found.shape)} and {tuple(expected.shape)}"
    error = (found.double() - expected.double()).flatten(1).norm(dim=1)
    norm = expected.double().flatten(1).norm(dim=1)
    assert (norm > 0).all(), f"{label}: nothing to compare with, the oracle's row is zero"
    worst = float((error / norm).max())
    assert worst < tolerance, f"{label}: relative difference {worst:.3g}"
