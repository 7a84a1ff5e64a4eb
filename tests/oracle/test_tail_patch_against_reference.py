"""Tail-patch is a real optimizer step: exact equals stepping the optimizer by hand, and fast equals exact.

Agreement of the two paths is tested in float64. In float32 the gradients of some biases (those of
keys, which do not change a softmax) are only rounding noise, and Adafactor divides noise by noise.
There the real step is accurate to one per cent, and the two paths differ by less than that.
"""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.optim import AdamW, Optimizer
from transformers import LlamaForCausalLM
from transformers.optimization import Adafactor

from tiny_models import CONTEXT_TOKENS, VOCABULARY, tiny_model, tiny_tokenizer
from trackstar.corpus import Example, Query, TokenizedExample, tokenize_example, tokenize_query
from trackstar.errors import GradientError, ModelError, OptionError, PretrainingError, TrackstarError
from trackstar.gradients.estimated_moment import estimate_second_moment
from trackstar.gradients.second_moment import FactoredMoment, Moment, SecondMoment
from trackstar.model.batching import make_batch
from trackstar.model.language_model import LanguageModel, load_model, wrap_model
from trackstar.pretraining import OPTIMIZER_FILE, PretrainingConfig, learning_rate, pretrain
from trackstar.pretraining.checkpoints import read_state, restore
from trackstar.pretraining.optimizers import apply_gradients, make_optimizer
from trackstar.pretraining.training import summed_loss
from trackstar.tail_patch import Pair, TailPatch, TrainingStep, fast, mean_top_effect, tail_patch, top_effects

ARCHITECTURES = ("llama", "llama-tied", "gpt2", "gpt_neox", "gemma2", "qwen3")
Path_ = Literal["fast", "exact"]
PATHS: tuple[Path_, Path_] = ("exact", "fast")
CAPITALS = {"France": "Paris", "Spain": "Madrid", "Chad": "Ndjamena", "Peru": "Lima", "Oman": "Muscat"}
SENTENCES = [f"The capital of {country} is {capital}." for country, capital in CAPITALS.items()]
CONFIG: dict[str, Any] = {
    "width": 16,
    "layers": 2,
    "heads": 2,
    "key_value_heads": 1,
    "mlp_width": 24,
    "context_tokens": 48,
    "vocabulary": 300,
    "warmup_steps": 4,
    "steps": 8,
    "batch_tokens": 64,
    "checkpoint_steps": 8,
}
# Functions in which a measurement is interrupted: before a step, after it, and with hooks set.
INTERRUPTED = {
    "exact": ("exact._make_step", "exact.measured_log_probabilities", "exact.nn.functional.cross_entropy"),
    "fast": ("factors._head_gradients", "fast.make_adapters", "patched.log_probabilities", "patched._Patch.on_linear"),
}
ADAFACTOR = PretrainingConfig(**CONFIG, base_learning_rate=0.3)
ADAMW = PretrainingConfig(**CONFIG, base_learning_rate=0.02, optimizer="adamw")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of pretraining runs by optimizer; do not change their files."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("adafactor", "adamw")}
    pretrain(SENTENCES, folders["adafactor"], ADAFACTOR, progress=False)
    pretrain(SENTENCES, folders["adamw"], ADAMW, progress=False)
    return folders


def facts(model: LanguageModel) -> tuple[list[TokenizedExample], list[TokenizedExample]]:
    """Queries about capitals, with completions of several tokens, and the sentences that state them."""
    queries = [
        tokenize_query(
            Query(query_id=f"capital of {country}", prompt=f"The capital of {country} is", completion=capital),
            model.tokenizer,
            window_tokens=48,
        )
        for country, capital in CAPITALS.items()
    ]
    examples = [
        tokenize_example(Example(example_id=f"e{record}", text=text, record=record), model.tokenizer, window_tokens=48)[
            0
        ]
        for record, text in enumerate(SENTENCES)
    ]
    return queries, examples


# ---- Random models, examples and steps -----------------------------------------------------------


def example(name: str, draw: np.random.Generator, tokens: int, targets: int) -> TokenizedExample:
    """Random tokens, some of them repeated and some the padding token, which is never trained."""
    token_ids = draw.integers(0, 12, tokens) if tokens % 2 else draw.integers(0, VOCABULARY, tokens)
    return TokenizedExample(
        example_id=name,
        parent_id=name,
        record=0,
        window=0,
        text="",
        token_ids=token_ids.astype(np.int32),
        target_mask=(np.arange(tokens) >= tokens - targets) & (np.arange(tokens) > 0),
    )


def examples() -> tuple[list[TokenizedExample], list[TokenizedExample], list[Pair]]:
    """Long and short queries, long and short proponents, and every pair of them."""
    draw = np.random.default_rng(5)
    queries = [example(f"q{n}", draw, tokens, of) for n, (tokens, of) in enumerate([(12, 1), (31, 3), (4, 2)])]
    proponents = [example(f"p{n}", draw, tokens, tokens) for n, tokens in enumerate([20, 7, 33, 2])]
    pairs = [Pair(query=q, proponent=p) for q, p in itertools.product(range(3), range(4))]
    return queries, proponents, pairs


def with_adafactor(
    architecture: str,
    steps: int = 3,
    dtype: torch.dtype = torch.float64,
    options: dict[str, Any] | None = None,
    zero_biases: bool = False,
) -> tuple[LanguageModel, TrainingStep]:
    """A model and the step that follows `steps` real ones of Adafactor on random tokens."""
    module = tiny_model(architecture).requires_grad_(True)
    torch.nn.Module.to(module, dtype)
    if zero_biases:  # as many families initialize them: then ε₂, the least scale of a parameter, applies
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                parameter.data.zero_()
    settings: dict[str, Any] = {"lr": 0.05, "relative_step": False, **(options or {})}
    optimizer = Adafactor(list(module.parameters()), **settings)
    draw = torch.Generator().manual_seed(3)
    for _ in range(steps):
        token_ids = torch.randint(3, VOCABULARY, (2, 16), generator=draw)
        module(input_ids=token_ids, labels=token_ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model = wrap_model(module, tiny_tokenizer(), layer_blocks=2)
    return model, TrainingStep.from_optimizer(optimizer, model)


def with_second_moment(architecture: str) -> tuple[LanguageModel, TrainingStep]:
    """A model without optimizer state, and the relative step from V, which is estimated from examples."""
    module = tiny_model(architecture)
    torch.nn.Module.to(module, torch.float64)
    model = wrap_model(module, tiny_tokenizer(), layer_blocks=2)
    moment = estimate_second_moment(model, examples()[1])
    return model, TrainingStep.from_second_moment(moment, model, learning_rate=0.05)


def assert_same_effects(found: TailPatch, expected: TailPatch, *, relative: float) -> None:
    """Compare effects relative to their mean, as probabilities and as log-probabilities."""
    np.testing.assert_allclose(found.before, expected.before, rtol=1e-5)
    scale = np.abs(expected.effect).mean()
    np.testing.assert_allclose(found.effect, expected.effect, rtol=0, atol=relative * scale)
    logarithms = np.log(expected.after / expected.before)
    atol = relative * np.abs(logarithms).mean()
    np.testing.assert_allclose(np.log(found.after / found.before), logarithms, rtol=0, atol=atol)


def snapshot(model: LanguageModel, optimizer: Optimizer) -> dict[str, Any]:
    """Copies of everything that a measurement must restore."""
    held: dict[str, Any] = {}
    for name, parameter in model.module.named_parameters():
        held[name] = parameter.detach().clone()
        held[f"{name}: trainable"] = parameter.requires_grad
        held[f"{name}: gradient"] = parameter.grad
        for key, value in optimizer.state.get(parameter, {}).items():
            held[f"{name}: {key}"] = value.clone() if isinstance(value, Tensor) else value
    return held


def assert_unchanged(model: LanguageModel, optimizer: Optimizer, held: dict[str, Any]) -> None:
    now = snapshot(model, optimizer)
    assert now.keys() == held.keys()
    for key, value in held.items():
        same = torch.equal(now[key], value) if isinstance(value, Tensor) else now[key] == value
        assert same, key
        if isinstance(value, Tensor):
            assert now[key].dtype == value.dtype, key
    hooks = [h for m in model.module.modules() for h in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)]
    assert not any(hooks)


# ---- Exact: the optimizer's own step -------------------------------------------------------------


def probability(module: Any, query: TokenizedExample) -> float:
    """Probability of the completion, as the product of its tokens' probabilities."""
    token_ids = torch.from_numpy(query.token_ids.astype(np.int64))[None]
    with torch.no_grad():
        probabilities = module(input_ids=token_ids).logits[0].double().softmax(dim=-1)
    targets = np.flatnonzero(query.target_mask)
    return float(np.prod([float(probabilities[t - 1, query.token_ids[t]]) for t in targets]))


def stepped_by_hand(folder: Path, query: TokenizedExample, proponent: TokenizedExample) -> tuple[float, float]:
    """Probability before and after, from a fresh read of the checkpoint and one step of the training loop."""
    module = LlamaForCausalLM.from_pretrained(folder).train()
    state = read_state(folder)
    config = PretrainingConfig(**state.settings)
    optimizer = make_optimizer(module, config)
    restore(folder, module, optimizer)
    before = probability(module, query)
    loss, targets = summed_loss(module, make_batch([proponent], [0]))
    (loss / targets).backward()
    apply_gradients(module, optimizer, state.step + 1, config)
    return before, probability(module, query)


@pytest.mark.parametrize("checkpoint", ["checkpoint-000008", "checkpoint-000000"])
@pytest.mark.parametrize("optimizer", ["adafactor", "adamw"])
def test_exact_equals_stepping_the_checkpoints_optimizer_by_hand(
    runs: dict[str, Path], optimizer: str, checkpoint: str
) -> None:
    folder = runs[optimizer] / checkpoint
    model = load_model(folder, layer_blocks=2)
    queries, proponents = facts(model)
    assert max(query.target_mask.sum() for query in queries) > 1
    pairs = [Pair(query=q, proponent=p) for q, p in [(0, 0), (1, 0), (0, 2), (3, 3)]]
    step = TrainingStep.from_checkpoint(folder, model)
    found = tail_patch(model, step, queries, proponents, pairs, path="exact")
    expected = np.array([stepped_by_hand(folder, queries[p.query], proponents[p.proponent]) for p in pairs])
    np.testing.assert_allclose(found.before, expected[:, 0], rtol=1e-5)
    effect = expected[:, 1] - expected[:, 0]
    np.testing.assert_allclose(found.effect, effect, rtol=0, atol=1e-4 * np.abs(effect).mean())
    np.testing.assert_array_equal(found.effect, found.after - found.before)
    assert found.pairs == tuple(pairs)
    number = int(checkpoint.removeprefix("checkpoint-")) + 1
    assert f"step {number}" in found.step


def test_a_checkpoints_step_is_the_one_that_would_have_come_next(runs: dict[str, Path]) -> None:
    for name, config in (("adafactor", ADAFACTOR), ("adamw", ADAMW)):
        folder = runs[name] / "checkpoint-000008"
        model = load_model(folder, layer_blocks=2)
        step = TrainingStep.from_checkpoint(folder, model)
        assert {group["lr"] for group in step.optimizer.param_groups} == {learning_rate(9, config)}
        assert step.max_gradient_norm == (1.0 if name == "adamw" else None)
        saved = load_file(folder / OPTIMIZER_FILE)
        parameters = dict(model.module.named_parameters())
        for key, value in saved.items():
            state, _, parameter = key.partition("/")
            assert torch.equal(torch.as_tensor(step.optimizer.state[parameters[parameter]][state]), value), key


@pytest.mark.parametrize(
    ("name", "path"),
    [
        *itertools.product(["adafactor", "adafactor, first step", "float64 weights", "V alone"], PATHS),
        ("adamw", "exact"),
    ],
)
def test_weights_and_optimizer_state_are_left_bit_for_bit(
    runs: dict[str, Path], name: str, path: Path_, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "float64 weights":
        model, step = with_adafactor("gpt2")
        queries, proponents, _ = examples()
    elif name == "V alone":
        model, step = with_second_moment("llama")
        queries, proponents, _ = examples()
    else:
        folder = runs[name.split(",")[0]] / ("checkpoint-000000" if "first" in name else "checkpoint-000008")
        model = load_model(folder, layer_blocks=2)
        step = TrainingStep.from_checkpoint(folder, model)
        queries, proponents = facts(model)
    pairs = [Pair(query=0, proponent=0), Pair(query=1, proponent=1)]
    held, digest = snapshot(model, step.optimizer), model.digest()
    first = tail_patch(model, step, queries, proponents, pairs, path=path)
    assert_unchanged(model, step.optimizer, held)
    second = tail_patch(model, step, queries, proponents, pairs, path=path)
    np.testing.assert_array_equal(second.after, first.after)

    def interrupted(*_arguments: Any, **_options: Any) -> None:
        raise KeyboardInterrupt

    # The measurement before the step is replaced, so that the interruption comes in the middle.
    monkeypatch.setattr(
        "trackstar.tail_patch.measure.measured_log_probabilities", lambda _model, used, **_: np.zeros(len(used))
    )
    for place in INTERRUPTED[path]:
        with monkeypatch.context() as patch:
            patch.setattr(f"trackstar.tail_patch.{place}", interrupted)
            with pytest.raises(KeyboardInterrupt):
                tail_patch(model, step, queries, proponents, pairs, path=path)
        assert_unchanged(model, step.optimizer, held)
    assert model.digest() == digest


def test_steps_of_any_other_optimizer_are_made_exactly() -> None:
    queries, proponents, pairs = examples()
    for make in (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), lambda p: torch.optim.Adafactor(p, lr=0.05)):
        module = tiny_model("llama-tied").requires_grad_(True)
        optimizer = make(list(module.parameters()))
        token_ids = torch.arange(3, 19).view(2, 8)
        module(input_ids=token_ids, labels=token_ids).loss.backward()
        optimizer.step()
        model = wrap_model(module, tiny_tokenizer(), layer_blocks=2)
        step = TrainingStep.from_optimizer(optimizer, model, max_gradient_norm=0.5)
        held = snapshot(model, optimizer)
        found = tail_patch(model, step, queries, proponents, pairs, path="exact")
        assert_unchanged(model, optimizer, held)
        module.requires_grad_(True).zero_grad()
        batch = make_batch(proponents, [1])
        logits = module(input_ids=batch.token_ids).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, batch.token_ids[0, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        optimizer.step()
        expected = probability(module, queries[1])
        place = pairs.index(Pair(query=1, proponent=1))
        assert found.after[place] == pytest.approx(expected, rel=1e-4)
        assert abs(np.log(found.after[place] / found.before[place])) > 1e-2


# ---- Fast equals exact ---------------------------------------------------------------------------

STEPS: dict[str, Callable[[str], tuple[LanguageModel, TrainingStep]]] = {
    "state of three steps": with_adafactor,
    "no state": lambda architecture: with_adafactor(architecture, steps=0),
    "relative step, unscaled": lambda architecture: with_adafactor(
        architecture,
        options={"lr": None, "relative_step": True, "scale_parameter": False, "clip_threshold": 0.7},
    ),
    "zero biases": lambda architecture: with_adafactor(architecture, zero_biases=True),
    "V alone": with_second_moment,
}


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        pair
        for pair in itertools.product(ARCHITECTURES, STEPS)
        if pair[1] != "zero biases" or pair[0] in ("gpt2", "gpt_neox")
    ],
)
def test_fast_equals_exact(architecture: str, kind: str) -> None:
    model, step = STEPS[kind](architecture)
    queries, proponents, pairs = examples()
    if kind == "no state":
        # Then V is the example's own G², and where G is zero the step is noise: for queries and keys
        # of examples with a single position.
        pairs = [pair for pair in pairs if len(proponents[pair.proponent].token_ids) > 2]
    exact, quick = (tail_patch(model, step, queries, proponents, pairs, path=path) for path in PATHS)
    assert np.abs(np.log(exact.after / exact.before)).mean() > 0.02
    assert_same_effects(quick, exact, relative=1e-4)


@pytest.mark.parametrize(
    ("architecture", "relative"), [("llama", 1e-4), ("llama-tied", 1e-4), ("gpt2", 2e-2), ("gpt_neox", 2e-2)]
)
def test_fast_equals_exact_in_float32(architecture: str, relative: float) -> None:
    model, step = with_adafactor(architecture, dtype=torch.float32)
    queries, proponents, pairs = examples()
    exact, quick = (tail_patch(model, step, queries, proponents, pairs, path=path) for path in PATHS)
    assert_same_effects(quick, exact, relative=relative)


@pytest.mark.parametrize("checkpoint", ["checkpoint-000008", "checkpoint-000000"])
def test_fast_equals_exact_for_a_pretraining_checkpoint(runs: dict[str, Path], checkpoint: str) -> None:
    folder = runs["adafactor"] / checkpoint
    model = load_model(folder, layer_blocks=2)
    step = TrainingStep.from_checkpoint(folder, model)
    queries, proponents = facts(model)
    pairs = [Pair(query=q, proponent=p) for q, p in itertools.product(range(5), range(5))]
    exact, quick = (tail_patch(model, step, queries, proponents, pairs, path=path) for path in PATHS)
    assert_same_effects(quick, exact, relative=1e-3)
    same_fact = [pairs.index(Pair(query=q, proponent=q)) for q in range(5)]
    assert exact.effect[same_fact].mean() > 0  # another step on the fact helps


@pytest.mark.parametrize("path", PATHS)
def test_batches_and_the_order_of_pairs_do_not_matter(path: Path_, monkeypatch: pytest.MonkeyPatch) -> None:
    model, step = with_adafactor("gpt2")
    queries, proponents, pairs = examples()
    whole = tail_patch(model, step, queries, proponents, pairs, path=path)
    shuffled = [pairs[place] for place in np.random.default_rng(0).permutation(len(pairs))]
    for batch_tokens, factor_bytes in ((1, 1 << 30), (70, 60_000), (4096, 1)):
        monkeypatch.setattr(fast, "FACTOR_BYTES", factor_bytes)
        found = tail_patch(model, step, queries, proponents, shuffled, path=path, batch_tokens=batch_tokens)
        assert found.pairs == tuple(shuffled)
        order = [found.pairs.index(pair) for pair in pairs]
        np.testing.assert_allclose(found.after[order], whole.after, rtol=1e-7)
        np.testing.assert_allclose(found.before[order], whole.before, rtol=1e-7)
    for place in (0, 7):  # alone, and twice
        alone = tail_patch(model, step, queries, proponents, [pairs[place]] * 2, path=path)
        np.testing.assert_allclose(alone.after, whole.after[place], rtol=1e-7)


def test_a_proponent_is_stepped_on_once_for_all_its_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    model, step = with_adafactor("llama")
    queries, proponents, _ = examples()
    pairs = [Pair(query=q, proponent=p) for q, p in [(0, 2), (1, 2), (2, 2), (1, 0)]]
    seen: list[int] = []
    original = fast.gradient_factors

    def counted(*arguments: Any, **options: Any) -> Any:
        seen.extend(arguments[2].indices)
        return original(*arguments, **options)

    monkeypatch.setattr(fast, "gradient_factors", counted)
    tail_patch(model, step, queries, proponents, pairs)
    assert sorted(seen) == [0, 2]


def test_groups_that_do_not_fit_in_memory_are_halved(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, step = with_adafactor("llama")
    queries, proponents, pairs = examples()
    expected = tail_patch(model, step, queries, proponents, pairs)
    original = fast.gradient_factors

    def limited(*arguments: Any, **options: Any) -> Any:
        if len(arguments[2].indices) > 2:
            raise MemoryError
        return original(*arguments, **options)

    monkeypatch.setattr(fast, "gradient_factors", limited)
    found = tail_patch(model, step, queries, proponents, pairs)
    np.testing.assert_allclose(found.after, expected.after, rtol=1e-9)
    assert "memory ran out" in capsys.readouterr().err


def test_no_pairs_give_an_empty_result() -> None:
    model, step = with_adafactor("llama")
    queries, proponents, _ = examples()
    for path in PATHS:
        assert tail_patch(model, step, queries, proponents, [], path=path).effect.shape == (0,)


# ---- V alone -------------------------------------------------------------------------------------


def uneven(moment: SecondMoment, *, floor: float) -> SecondMoment:
    """V with entries below the floor, and with factors whose means differ, as after rounding."""
    moments: dict[str, Moment] = {}
    for name, factors in moment.moments.items():
        assert isinstance(factors, FactoredMoment)
        row, column = factors.row.clone(), 1.5 * factors.column
        row[1], column[2] = 0, 0
        moments[name] = FactoredMoment(row=row, column=column)
    return SecondMoment(kind="factored", moments=moments, source=moment.source, floor=floor)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_step_from_v_moves_the_covered_matrices_by_the_relative_step(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = with_second_moment(architecture)
    estimated = estimate_second_moment(model, examples()[1])
    moment = uneven(estimated, floor=0.2)
    step = TrainingStep.from_second_moment(moment, model, learning_rate=0.05)
    queries, proponents, _ = examples()
    module: Any = model.module
    parameters = dict(module.named_parameters())
    old = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    moved: list[dict[str, Tensor]] = []

    def look(looked: LanguageModel, chosen: Sequence[TokenizedExample], **_options: Any) -> np.ndarray:
        moved.append({name: p.detach() - old[name] for name, p in parameters.items() if not torch.equal(p, old[name])})
        return np.zeros(len(chosen))

    monkeypatch.setattr("trackstar.tail_patch.exact.measured_log_probabilities", look)
    tail_patch(model, step, queries, proponents, [Pair(query=0, proponent=p) for p in (0, 1)], path="exact")
    assert len(moved) == 2
    clipped = 0
    module.requires_grad_(True)
    for proponent, changes in enumerate(moved):
        assert changes.keys() == {matrix.parameter for matrix in model.matrices}
        module.zero_grad()
        token_ids = make_batch(proponents, [proponent]).token_ids
        logits = module(input_ids=token_ids).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, token_ids[0, 1:], reduction="sum").backward()
        for matrix in model.matrices:
            gradient, weight = parameters[matrix.parameter].grad, old[matrix.parameter]
            assert gradient is not None
            factors = moment.moments[matrix.name]
            assert isinstance(factors, FactoredMoment)
            row, column = (part.double().clamp_min(0.2 * float(part.mean())) for part in (factors.row, factors.column))
            v = torch.outer(row, column) / row.mean()
            update = gradient / (v.T if matrix.transposed else v).sqrt()
            root = update.square().mean().sqrt()
            clipped += int(root > 1)
            expected = -0.05 * weight.square().mean().sqrt().clamp_min(1e-3) * update / root.clamp_min(1.0)
            atol = 1e-4 * float(expected.std())
            torch.testing.assert_close(changes[matrix.parameter], expected, rtol=1e-4, atol=atol)
    assert 0 < clipped < 2 * len(model.matrices)
    assert "V estimated from 4 examples and not updated" in step.description
    assert "attention and MLP matrices alone" in step.description


# ---- Errors --------------------------------------------------------------------------------------


def refusal(error: type[TrackstarError], run: Callable[[], object]) -> str:
    with pytest.raises(error) as caught:
        run()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_fast_refuses_what_is_not_adafactors_factored_update(runs: dict[str, Path]) -> None:
    folder = runs["adamw"] / "checkpoint-000008"
    model = load_model(folder, layer_blocks=2)
    queries, proponents = facts(model)
    step = TrainingStep.from_checkpoint(folder, model)
    pairs = [Pair(query=0, proponent=0)]
    message = refusal(OptionError, lambda: tail_patch(model, step, queries, proponents, pairs))
    assert "AdamW" in message
    assert "exact path" in message

    queries, proponents, pairs = examples()
    for options, word in (({"weight_decay": 0.1}, "weight_decay"), ({"beta1": 0.9}, "beta1")):
        model, step = with_adafactor("llama", options=options)
        assert word in refusal(OptionError, lambda m=model, s=step: tail_patch(m, s, queries, proponents, pairs))
    model, step = with_adafactor("llama")
    step = TrainingStep.from_optimizer(step.optimizer, model, max_gradient_norm=1.0)
    assert "norm" in refusal(OptionError, lambda: tail_patch(model, step, queries, proponents, pairs))
    model, step = with_adafactor("llama", dtype=torch.bfloat16)
    assert "bfloat16" in refusal(OptionError, lambda: tail_patch(model, step, queries, proponents, pairs))
    assert np.isfinite(tail_patch(model, step, queries, proponents, pairs, path="exact").after).all()


def test_fast_names_a_parameter_that_it_cannot_move() -> None:
    queries, proponents, pairs = examples()
    module = tiny_model("llama")
    attention = module.get_submodule("model.layers.1.self_attn")
    attention.register_parameter("sinks", torch.nn.Parameter(torch.ones(4)))
    model = wrap_model(module, tiny_tokenizer(), layer_blocks=2)
    step = TrainingStep.from_optimizer(Adafactor(list(module.parameters()), lr=0.1, relative_step=False), model)
    message = refusal(ModelError, lambda: tail_patch(model, step, queries, proponents, pairs))
    assert "model.layers.1.self_attn.sinks" in message

    class Odd(torch.nn.Module):
        """A norm whose rows cannot have separate weights."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(24))

        def forward(self, hidden: Tensor) -> Tensor:
            return hidden * self.weight.flatten()[:24]

    module = tiny_model("llama")
    module.get_submodule("model").norm = Odd()
    model = wrap_model(module, tiny_tokenizer(), layer_blocks=2)
    step = TrainingStep.from_optimizer(Adafactor(list(module.parameters()), lr=0.1, relative_step=False), model)
    assert "model.norm.weight" in refusal(ModelError, lambda: tail_patch(model, step, queries, proponents, pairs))


@pytest.mark.parametrize("path", PATHS)
def test_results_that_are_not_finite_name_the_examples(path: Path_) -> None:
    model, step = with_adafactor("llama", dtype=torch.float32)
    trainable = [parameter.requires_grad for parameter in model.module.parameters()]
    queries, proponents, _ = examples()
    pairs = [Pair(query=1, proponent=2)]
    step.optimizer.param_groups[0]["lr"] = 1e38
    message = refusal(GradientError, lambda: tail_patch(model, step, queries, proponents, pairs, path=path))
    assert "p2" in message
    assert "q1" in message
    with torch.no_grad():
        model.module.get_input_embeddings().get_parameter("weight")[int(proponents[2].token_ids[4])] = torch.nan
    without_nan = [query for query in queries if int(proponents[2].token_ids[4]) not in query.token_ids]
    message = refusal(
        GradientError,
        lambda: tail_patch(model, step, without_nan, proponents, [Pair(query=0, proponent=2)], path=path),
    )
    assert "p2" in message
    with torch.no_grad():
        model.module.get_input_embeddings().get_parameter("weight").fill_(torch.nan)
    message = refusal(GradientError, lambda: tail_patch(model, step, queries, proponents, pairs, path=path))
    assert "q1" in message
    assert [parameter.requires_grad for parameter in model.module.parameters()] == trainable


def test_pairs_and_examples_that_cannot_be_measured_are_refused(runs: dict[str, Path]) -> None:
    model, step = with_adafactor("llama")
    queries, proponents, _ = examples()
    draw = np.random.default_rng(0)
    proponents += [example("no target", draw, 5, 0), example("too long", draw, CONTEXT_TOKENS + 2, 3)]
    foreign = example("foreign", draw, 6, 6)
    foreign.token_ids[3] = VOCABULARY
    proponents.append(foreign)

    def run(query: int, proponent: int, **options: Any) -> object:
        return tail_patch(model, step, queries, proponents, [Pair(query=query, proponent=proponent)], **options)

    assert "query 3, expected 0 to 2" in refusal(OptionError, lambda: run(3, 0))
    assert "proponent -1" in refusal(OptionError, lambda: run(0, -1))
    for place, name in enumerate(("no target", "too long", "foreign"), start=4):
        assert f"proponent {name}" in refusal(OptionError, lambda place=place: run(0, place))
    assert "`batch_tokens`: expected 1 or more, found 0" in refusal(OptionError, lambda: run(0, 0, batch_tokens=0))
    other, _ = with_adafactor("llama")
    pairs = [Pair(query=0, proponent=0)]
    assert "model object" in refusal(OptionError, lambda: tail_patch(other, step, queries, proponents, pairs))
    assert "`max_gradient_norm`" in refusal(
        OptionError, lambda: TrainingStep.from_optimizer(step.optimizer, model, max_gradient_norm=0.0)
    )


def test_steps_that_cannot_be_made_are_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = runs["adafactor"] / "checkpoint-000008"
    other = load_model(runs["adafactor"] / "checkpoint-000000", layer_blocks=2)
    message = refusal(ModelError, lambda: TrainingStep.from_checkpoint(folder, other))
    assert "model.embed_tokens.weight" in message
    assert "training_state.json" in refusal(
        PretrainingError, lambda: TrainingStep.from_checkpoint(tmp_path, load_model(folder, layer_blocks=2))
    )
    model, _ = with_second_moment("llama")
    moment = estimate_second_moment(model, examples()[1], kind="elementwise")
    assert "elementwise" in refusal(OptionError, lambda: TrainingStep.from_second_moment(moment, model))
    factored = SecondMoment(kind="factored", moments={}, source="nothing")
    refusal(TrackstarError, lambda: TrainingStep.from_second_moment(factored, model))
    whole = estimate_second_moment(model, examples()[1])
    for rate in (0.0, float("nan")):
        assert "`learning_rate`" in refusal(
            OptionError, lambda rate=rate: TrainingStep.from_second_moment(whole, model, learning_rate=rate)
        )


# ---- Averages ------------------------------------------------------------------------------------


def test_the_score_is_the_mean_over_queries_of_their_top_proponents() -> None:
    # Query 7's effects are 0.1, 0.3 and -0.4 from the best proponent on, query 2's are 0.2, 0 and 0.1.
    order = [(7, 0.1), (2, 0.2), (7, 0.3), (2, 0.0), (2, 0.1), (7, -0.4)]
    effects = np.array([effect for _, effect in order])
    result = TailPatch(
        pairs=tuple(Pair(query=query, proponent=place) for place, (query, _) in enumerate(order)),
        before=np.full(6, 0.5),
        after=0.5 + effects,
        step="by hand",
    )
    np.testing.assert_allclose(top_effects(result, 1), [0.1, 0.2])
    np.testing.assert_allclose(top_effects(result, 2), [0.2, 0.1])
    np.testing.assert_allclose(top_effects(result, 3), [0.0, 0.1], atol=1e-12)
    assert mean_top_effect(result, 1) == pytest.approx(0.15)
    assert mean_top_effect(result, 3) == pytest.approx(0.05)
    assert "query 7" in refusal(OptionError, lambda: top_effects(result, 4))
    assert "`k`: expected 1 or more, found 0" in refusal(OptionError, lambda: top_effects(result, 0))
    empty = TailPatch(pairs=(), before=np.zeros(0), after=np.zeros(0), step="")
    assert "no pair" in refusal(OptionError, lambda: mean_top_effect(empty, 1))


def test_the_optimizers_of_checkpoints_are_the_real_ones(runs: dict[str, Path]) -> None:
    for name, kind in (("adafactor", Adafactor), ("adamw", AdamW)):
        folder = runs[name] / "checkpoint-000008"
        model = load_model(folder, layer_blocks=2)
        step = TrainingStep.from_checkpoint(folder, model)
        assert type(step.optimizer) is kind
        assert {id(p) for g in step.optimizer.param_groups for p in g["params"]} == {
            id(parameter) for parameter in model.module.parameters()
        }
