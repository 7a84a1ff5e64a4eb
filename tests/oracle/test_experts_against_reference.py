"""Fused experts against the oracle: φ, V from every origin, token splits and training steps."""

import functools
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import reference
from comparisons import (
    SIDE,
    assert_rows_close,
    by_block,
    package_phi,
    random_examples,
    reference_gradients,
    reference_phi,
    with_targets,
)
from tiny_models import CONTEXT_TOKENS, VOCABULARY, tiny_tokenizer
from trackstar.corpus import TokenizedExample
from trackstar.errors import ModelError, SecondMomentError
from trackstar.gradients.dense_projection import FlattenedGradients
from trackstar.gradients.estimated_moment import estimate_second_moment
from trackstar.gradients.optimizer_state import second_moment_of
from trackstar.gradients.per_example import gradient_pass
from trackstar.gradients.projection import random_projection
from trackstar.gradients.second_moment import (
    NO_SECOND_MOMENT,
    ElementwiseMoment,
    FactoredMoment,
    SecondMoment,
    checked_second_moment,
)
from trackstar.gradients.token_split import ProjectionSettings, split_over_tokens
from trackstar.model.batching import make_batch
from trackstar.model.language_model import LanguageModel, wrap_model
from trackstar.tail_patch import Pair, TrainingStep, tail_patch

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "max_position_embeddings": CONTEXT_TOKENS,
    "sliding_window": 8,
}


@functools.cache
def experts_model(family: str) -> LanguageModel:
    """Mixtral stores an expert's matrices as [outputs, inputs], GPT-OSS as [inputs, outputs] with biases."""
    config = getattr(transformers, f"{family}Config")(**SIZES)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        module = getattr(transformers, f"{family}ForCausalLM")(config).eval()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(0.3 * torch.randn_like(parameter)) if parameter.ndim > 1 else parameter.add_(0.1)
    return wrap_model(module, tiny_tokenizer(), layer_blocks=2)


def examples() -> list[TokenizedExample]:
    every, completion, single = random_examples([17, 23, 9])
    return [
        every,
        with_targets(completion, [t >= 15 for t in range(23)]),
        with_targets(single, [t == 5 for t in range(9)]),
    ]


def drawn_moment(model: LanguageModel, kind: str) -> SecondMoment:
    draw = torch.Generator().manual_seed(7)

    def values(*shape: int) -> Tensor:
        return torch.exp(2 * torch.randn(*shape, generator=draw))

    moments: dict[str, Any] = {}
    for matrix in model.matrices if kind != "none" else ():
        if kind == "factored":
            moments[matrix.name] = FactoredMoment(row=values(matrix.rows), column=values(matrix.columns))
        else:
            moments[matrix.name] = ElementwiseMoment(entries=values(matrix.rows, matrix.columns))
    return SecondMoment(kind=kind, moments=moments, source="drawn")  # pyright: ignore[reportArgumentType]


def dense(moment: SecondMoment) -> dict[str, Tensor] | None:
    return {name: of.values().double() for name, of in moment.moments.items()} or None


FAMILIES = pytest.mark.parametrize("family", ["Mixtral", "GptOss"])


@FAMILIES
def test_each_experts_matrices_are_matrices_of_the_layers_mlp_block(family: str):
    model = experts_model(family)
    of_experts = [matrix for matrix in model.matrices if matrix.expert is not None]
    assert len(of_experts) == 2 * 2 * SIZES["num_local_experts"]
    assert {matrix.kind for matrix in of_experts} == {"mlp"}
    assert model.coverage.matrices == len(model.matrices) == len({matrix.name for matrix in model.matrices})
    assert model.coverage.parameters == sum(matrix.rows * matrix.columns for matrix in model.matrices)


@pytest.mark.parametrize("kind", ["none", "factored", "elementwise"])
@FAMILIES
def test_projected_gradients_of_experts_equal_the_dense_kronecker_projections(family: str, kind: str):
    model = experts_model(family)
    moment = drawn_moment(model, kind)
    expected = reference_phi(model, examples(), dense(moment), seed=3)
    for block, phi in by_block(model, package_phi(model, examples(), moment, seed=3)).items():
        assert_rows_close(phi, expected[block], label=block)


@FAMILIES
def test_flattened_projections_of_experts_equal_the_references(family: str):
    model = experts_model(family)
    consumer = FlattenedGradients(model, NO_SECOND_MOMENT, seed=3, side=SIDE)
    with gradient_pass(model, consumer) as run:
        run(make_batch(examples(), range(3)))
    expected = torch.zeros(3, len(model.blocks), SIDE**2, dtype=torch.float64)
    for row, gradients in enumerate(reference_gradients(model, examples())):
        for matrix in model.matrices:
            projection = random_projection(3, f"{matrix.name} flattened", matrix.rows * matrix.columns, SIDE**2)
            expected[row, matrix.block] += gradients[matrix.name].reshape(-1) @ projection.double()
    assert_rows_close(consumer.result(), expected.flatten(1))


@pytest.mark.parametrize("kind", ["factored", "elementwise"])
@FAMILIES
def test_estimated_second_moment_of_experts_equals_the_mean_of_squares(family: str, kind: Any):
    model = experts_model(family)
    gradients = reference_gradients(model, examples())
    for name, moment in estimate_second_moment(model, examples(), kind=kind).moments.items():
        squares = reference.mean_squared_gradient([of[name] for of in gradients])
        if not squares.any():  # an expert that no token reaches
            assert not moment.values().nan_to_num().any()
            continue
        expected = reference.factored_second_moment(squares) if kind == "factored" else squares
        assert_rows_close(moment.values()[None], expected[None], label=name)


def test_expert_that_no_token_reaches_has_the_mean_second_moment_of_the_others():
    model = experts_model("Mixtral")
    moment = drawn_moment(model, "factored")
    stack = [m.name for m in model.matrices if m.parameter == "model.layers.0.mlp.experts.down_proj"]
    zero = FactoredMoment(row=torch.zeros(24), column=torch.zeros(20))
    changed = SecondMoment(kind="factored", moments={**moment.moments, stack[2]: zero}, source="drawn")
    checked = checked_second_moment(changed, model.matrices)
    others: Any = [moment.moments[name] for name in stack if name != stack[2]]
    found: Any = checked.moments[stack[2]]
    torch.testing.assert_close(found.row, torch.stack([other.row for other in others]).mean(dim=0))
    torch.testing.assert_close(found.column, torch.stack([other.column for other in others]).mean(dim=0))
    assert checked.source == (
        "drawn; 1 matrices of experts that no token reached have the mean of their layer's others"
    )
    none = SecondMoment(kind="factored", moments={**moment.moments, **dict.fromkeys(stack, zero)}, source="drawn")
    with pytest.raises(SecondMomentError, match=r"second moment of model.layers.0.mlp.experts.down_proj.0 .* is zero"):
        checked_second_moment(none, model.matrices)


@pytest.mark.parametrize("optimizer", ["AdamW", "Adafactor (transformers)", "Adafactor (torch)"])
@FAMILIES
def test_second_moment_of_experts_is_their_slice_of_the_optimizers(family: str, optimizer: str):
    module: Any = experts_model(family).module
    import copy

    module = copy.deepcopy(module).requires_grad_(True)
    if optimizer == "AdamW":
        made: Any = torch.optim.AdamW(module.parameters(), lr=1e-4)
    elif optimizer == "Adafactor (torch)":
        made = torch.optim.Adafactor(module.parameters(), lr=1e-4)
    else:
        made = transformers.optimization.Adafactor(module.parameters(), lr=1e-4, relative_step=False)
    ids = torch.randint(3, VOCABULARY, (8, 30), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        made.zero_grad()
        module(input_ids=ids, labels=ids).loss.backward()
        made.step()
    made.zero_grad()
    model = wrap_model(module, tiny_tokenizer(), layer_blocks=2)
    found = second_moment_of(made, model, kind="elementwise")
    for matrix in model.matrices:
        state = made.state[module.get_parameter(matrix.parameter)]
        if optimizer == "AdamW":
            whole = reference.adam_second_moment(state["exp_avg_sq"], 2, 0.999)
        elif optimizer == "Adafactor (torch)":
            row, column = state["row_var"].double(), state["col_var"].double()
            whole = row @ column / row.mean(dim=-2, keepdim=True)
        else:
            row, column = state["exp_avg_sq_row"].double(), state["exp_avg_sq_col"].double()
            whole = row[..., :, None] * column[..., None, :] / row.mean(dim=-1)[..., None, None]
        expected = whole if matrix.expert is None else whole[matrix.expert]
        expected = expected.T if matrix.transposed else expected
        assert_rows_close(found.moments[matrix.name].values()[None], expected[None], label=matrix.name)


@pytest.mark.parametrize("kind", ["none", "factored", "elementwise"])
@FAMILIES
def test_token_parts_add_up_to_the_product_and_follow_the_routing(family: str, kind: str):
    model = experts_model(family)
    moment = drawn_moment(model, kind)
    phi = package_phi(model, examples(), moment)
    vectors = torch.randn(phi.shape, generator=torch.Generator().manual_seed(2))
    settings = ProjectionSettings(seed=0, side=SIDE)
    parts = split_over_tokens(model, moment, examples(), vectors, settings)
    for part, product in zip(parts, (phi * vectors).sum(dim=1), strict=True):
        torch.testing.assert_close(part.sum(), product, rtol=1e-3, atol=1e-3)
    for row, example in enumerate(examples()):  # alone, without padding or neighbours in an expert
        (alone,) = split_over_tokens(model, moment, [example], vectors[row : row + 1], settings)
        torch.testing.assert_close(parts[row], alone, rtol=1e-3, atol=1e-3)


def test_exact_tail_patch_moves_experts_and_the_fast_one_names_them():
    model = experts_model("Mixtral")
    moment = checked_second_moment(estimate_second_moment(model, examples()), model.matrices)
    step = TrainingStep.from_second_moment(moment, model)
    pairs = [Pair(query=0, proponent=1), Pair(query=2, proponent=2)]
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    result = tail_patch(model, step, examples(), examples(), pairs, path="exact")
    assert (result.effect != 0).all()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.module.state_dict().items())
    with pytest.raises(ModelError, match=r'experts\.\w+_proj: MixtralExperts is neither .* `path="exact"`'):
        tail_patch(model, step, examples(), examples(), pairs)
