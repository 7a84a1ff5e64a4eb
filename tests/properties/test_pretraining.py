"""Pretraining: reproducible runs, the contents of checkpoints, and errors."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from trackstar.corpus import Example, open_corpus, tokenize_example
from trackstar.errors import OptionError, PretrainingError
from trackstar.pretraining import PretrainingConfig, learning_rate, pretrain, train_tokenizer
from trackstar.pretraining.checkpoints import LOCK_FILE
from trackstar.pretraining.data_order import batches_from, epoch_batches, tokenize_corpus
from trackstar.pretraining.training import new_model, summed_loss

CAPITALS = {
    "France": "Paris",
    "Spain": "Madrid",
    "Italy": "Rome",
    "Chad": "Ndjamena",
    "Peru": "Lima",
    "Oman": "Muscat",
    "Japan": "Tokyo",
}
SENTENCES = [
    text
    for country, capital in CAPITALS.items()
    for text in (f"The capital of {country} is {capital}.", f"{capital} is where {country} is governed from, they say.")
]
CONFIG = PretrainingConfig(
    width=16,
    layers=2,
    heads=2,
    key_value_heads=1,
    mlp_width=24,
    context_tokens=48,
    vocabulary=320,
    base_learning_rate=0.3,
    warmup_steps=4,
    steps=10,
    batch_tokens=96,
    pool_examples=6,
    checkpoint_steps=3,
    seed=7,
)
ADAMW = dataclasses.replace(CONFIG, optimizer="adamw", base_learning_rate=0.02)


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run; do not change its files."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("run")
    pretrain(SENTENCES, out, CONFIG)
    return out


class _Killed(BaseException):
    """Stands for a kill, since nothing catches it."""


def _killed_at(step: int, monkeypatch: pytest.MonkeyPatch, out: Path, config: PretrainingConfig) -> None:
    """Run until the gradients of `step` are computed, then stop without cleaning up."""
    import trackstar.pretraining.training as training

    original = training.apply_gradients

    def apply(module, optimizer, now, settings):
        if now == step:
            raise _Killed
        original(module, optimizer, now, settings)

    with monkeypatch.context() as patch:
        patch.setattr(training, "apply_gradients", apply)
        with pytest.raises(_Killed):
            pretrain(SENTENCES, out, config)


def _same_tensors(found: Path, expected: Path) -> None:
    left, right = load_file(found), load_file(expected)
    assert left.keys() == right.keys()
    for name in right:
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize("config", [CONFIG, ADAMW], ids=["adafactor", "adamw"])
def test_resumed_run_equals_the_uninterrupted_one(config: PretrainingConfig, tmp_path, monkeypatch, capsys) -> None:
    expected = pretrain(SENTENCES, tmp_path / "undisturbed", config)
    out = tmp_path / "disturbed"
    for step in (1, 5, 10):
        _killed_at(step, monkeypatch, out, config)
        (out / "checkpoint-000009.partial").mkdir(exist_ok=True)
        torch.rand(3)  # other random numbers have no influence
    found = pretrain(SENTENCES, out, config)
    assert "resuming from" in capsys.readouterr().err
    names = sorted(path.name for path in expected.iterdir())
    assert sorted(path.name for path in found.iterdir()) == names
    _same_tensors(found / "model.safetensors", expected / "model.safetensors")
    _same_tensors(found / "optimizer.safetensors", expected / "optimizer.safetensors")
    for name in names:
        if name == "tokenizer_config.json":  # Transformers records in it that the tokenizer was loaded from a folder
            continue
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name
    assert not list(out.glob("*.partial"))


def test_run_killed_at_any_moment_equals_the_uninterrupted_one(run_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    program = (
        "import json, sys, torch; torch.set_num_threads(1)\n"
        "from trackstar.pretraining import PretrainingConfig, pretrain\n"
        "texts, out, settings = json.load(sys.stdin); pretrain(texts, out, PretrainingConfig(**settings))"
    )
    content = json.dumps([SENTENCES, str(out), {**dataclasses.asdict(CONFIG), "steps": 100_000}])
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, env=dict(os.environ)
    )
    assert process.stdin is not None
    with process.stdin:
        process.stdin.write(content.encode())
    limit = time.monotonic() + 120
    while not (out / "checkpoint-000003").exists() and time.monotonic() < limit:
        assert process.poll() is None, "the run ended by itself"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = max(int(path.name.removeprefix("checkpoint-")) for path in out.glob("checkpoint-??????"))
    steps = max(CONFIG.steps, done + 1)
    expected = pretrain(SENTENCES, tmp_path / "undisturbed", dataclasses.replace(CONFIG, steps=steps))
    found = pretrain(SENTENCES, out, dataclasses.replace(CONFIG, steps=steps))
    for name in ("model.safetensors", "optimizer.safetensors", "training_state.json"):
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name


def test_run_resumed_with_more_steps_equals_a_longer_run(run_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    pretrain(SENTENCES, out, dataclasses.replace(CONFIG, steps=6, checkpoint_steps=2))
    longer = pretrain(SENTENCES, out, CONFIG)
    _same_tensors(longer / "model.safetensors", run_folder / "checkpoint-000010" / "model.safetensors")


@pytest.mark.parametrize(("config", "states"), [(CONFIG, 3), (ADAMW, 3)], ids=["adafactor", "adamw"])
def test_optimizer_file_holds_the_optimizers_own_state(config, states, tmp_path, monkeypatch) -> None:
    import trackstar.pretraining.training as training

    made = []
    original = training.make_optimizer

    def make(module, settings):
        made.append((module, original(module, settings)))
        return made[-1][1]

    monkeypatch.setattr(training, "make_optimizer", make)
    saved = load_file(pretrain(SENTENCES, tmp_path / "run", config) / "optimizer.safetensors")
    module, optimizer = made[0]
    expected = {}
    for name, parameter in module.named_parameters():
        for key, value in optimizer.state[parameter].items():
            expected[f"{key}/{name}"] = torch.as_tensor(value)
    assert saved.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(saved[key], value), key
    name = "model.layers.1.mlp.down_proj.weight"
    keys = {key.partition("/")[0] for key in saved if key.endswith(name)}
    if config.optimizer == "adafactor":
        assert keys == {"exp_avg_sq_row", "exp_avg_sq_col", "step", "RMS"}
        assert saved[f"exp_avg_sq_row/{name}"].shape == (CONFIG.width,)
        assert saved[f"exp_avg_sq_col/{name}"].shape == (CONFIG.mlp_width,)
    else:
        assert keys == {"exp_avg", "exp_avg_sq", "step"}
        assert saved[f"exp_avg_sq/{name}"].shape == (CONFIG.width, CONFIG.mlp_width)


def test_adafactor_state_is_the_papers_recurrence_over_the_gradients(tmp_path, monkeypatch) -> None:
    """Row means of V after t steps: v_t = β_t v_(t-1) + (1 - β_t) mean(g²), β_t = 1 - t^(-0.8)."""
    import trackstar.pretraining.training as training

    name = "model.layers.0.self_attn.q_proj.weight"
    squares = []
    original = training.apply_gradients

    def apply(module, optimizer, step, settings):
        squares.append(dict(module.named_parameters())[name].grad.double().square().mean(dim=1))
        original(module, optimizer, step, settings)

    monkeypatch.setattr(training, "apply_gradients", apply)
    saved = load_file(pretrain(SENTENCES, tmp_path / "run", CONFIG) / "optimizer.safetensors")
    expected = torch.zeros(CONFIG.width, dtype=torch.float64)
    for step, mean in enumerate(squares, start=1):
        decay = 1 - step**-0.8
        expected = decay * expected + (1 - decay) * mean
    torch.testing.assert_close(saved[f"exp_avg_sq_row/{name}"].double(), expected, rtol=1e-5, atol=0)
    assert saved[f"step/{name}"].item() == CONFIG.steps


@given(step=st.integers(1, 10**6), warmup=st.integers(1, 10**5), base=st.floats(1e-4, 10))
def test_learning_rate_is_base_over_root_of_step_or_warmup(step: int, warmup: int, base: float) -> None:
    config = PretrainingConfig(warmup_steps=warmup, base_learning_rate=base)
    expected = base / math.sqrt(max(step, warmup))
    assert learning_rate(step, config) == pytest.approx(expected, rel=1e-12)
    ramp = min(1.0, step / warmup)
    assert learning_rate(step, dataclasses.replace(config, optimizer="adamw")) == pytest.approx(ramp * expected)


def test_each_step_is_made_with_its_own_learning_rate(tmp_path, monkeypatch) -> None:
    import trackstar.pretraining.training as training

    rates = []
    original = training.make_optimizer

    def make(module, settings):
        optimizer = original(module, settings)
        step = optimizer.step
        optimizer.step = lambda: (rates.append(optimizer.param_groups[0]["lr"]), step())[1]  # type: ignore[method-assign]
        return optimizer

    monkeypatch.setattr(training, "make_optimizer", make)
    pretrain(SENTENCES, tmp_path / "run", CONFIG)
    assert rates == [learning_rate(step, CONFIG) for step in range(1, CONFIG.steps + 1)]


def test_loss_falls_until_the_corpus_is_memorized(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, width=32, mlp_width=64, steps=150, warmup_steps=10, checkpoint_steps=1000)
    last = pretrain(SENTENCES, tmp_path / "run", config)

    def mean_loss(folder: Path) -> float:
        model = LlamaForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        data = tokenize_corpus(open_corpus(SENTENCES), tokenizer, window_tokens=48)
        with torch.no_grad():
            loss, targets = summed_loss(model, data.batch(range(len(data.lengths))))
        return loss.item() / targets

    first = mean_loss(tmp_path / "run" / "checkpoint-000000")
    assert first == pytest.approx(math.log(320), rel=0.05)
    assert mean_loss(last) < 0.25 * first


def test_summed_loss_equals_the_models_own_example_by_example(tiny_models, tiny_tokenizer) -> None:
    model = tiny_models("llama")
    data = tokenize_corpus(open_corpus(SENTENCES), tiny_tokenizer, window_tokens=12)
    with torch.no_grad():
        loss, targets = summed_loss(model, data.batch(range(len(data.lengths))))
        expected, count = 0.0, 0
        for start, stop in zip(data.offsets[:-1], data.offsets[1:], strict=True):
            ids = torch.from_numpy(data.token_ids[start:stop].astype(np.int64))[None]
            scored = data.target_mask[start:stop][1:]
            losses = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
            expected += losses[torch.from_numpy(scored)].sum().item()
            count += int(scored.sum())
    assert targets == count
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_checkpoints_are_loadable_models_and_tokenize_as_the_indexer_does(run_folder: Path) -> None:
    assert sorted(path.name for path in run_folder.glob("checkpoint-*")) == [
        f"checkpoint-{step:06d}" for step in (0, 3, 6, 9, 10)
    ]
    for folder in run_folder.glob("checkpoint-*"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert len(tokenizer) == model.config.vocab_size
        [window] = tokenize_example(Example(example_id="0", text=SENTENCES[0], record=0), tokenizer, window_tokens=48)
        ids = window.token_ids.tolist()
        assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert ids == tokenizer(SENTENCES[0]).input_ids
        assert str(tokenizer.decode(ids, skip_special_tokens=True)).strip() == SENTENCES[0]
        assert (folder / "optimizer.safetensors").exists() == (folder.name != "checkpoint-000000")
        assert not [path for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pkl", ".pth")]


def test_tokenizer_is_a_function_of_the_texts_and_reads_any_text() -> None:
    first, second = (train_tokenizer(SENTENCES, vocabulary=320) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    for text in ("Zürich 東京 🌍", "a  b\n\tc", "</s> spelled out"):
        assert str(first.decode(first(text, add_special_tokens=False).input_ids)).strip() == text


def test_existing_tokenizer_is_used_and_saved(tiny_tokenizer, tmp_path: Path) -> None:
    last = pretrain(SENTENCES, tmp_path / "run", dataclasses.replace(CONFIG, steps=1), tokenizer=tiny_tokenizer)
    saved = AutoTokenizer.from_pretrained(last)
    assert saved.backend_tokenizer.to_str() == tiny_tokenizer.backend_tokenizer.to_str()
    other = pretrain(SENTENCES, tmp_path / "other", dataclasses.replace(CONFIG, steps=1), tokenizer=last)
    _same_tensors(other / "model.safetensors", last / "model.safetensors")


@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=60),
    budget=st.integers(2, 100),
    pool=st.integers(1, 30),
    seed=st.integers(0, 5),
)
def test_epoch_holds_every_window_once_within_the_budget(lengths, budget, pool, seed) -> None:
    sizes = np.array(lengths, dtype=np.int64)
    batches = epoch_batches(sizes, batch_tokens=budget, pool_examples=pool, seed=seed, epoch=0)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or max(lengths[index] for index in batch) * len(batch) <= budget


def test_data_order_resumes_from_any_batch_and_differs_between_epochs_and_seeds() -> None:
    lengths = np.arange(2, 42, dtype=np.int64)

    def batches(epoch: int, batch: int, seed: int, count: int) -> list[tuple[int, int, list[int]]]:
        order = batches_from(lengths, epoch, batch, batch_tokens=80, pool_examples=10, seed=seed)
        return [next(order) for _ in range(count)]

    whole = batches(0, 0, 3, 60)
    for start in (1, 17, 40):
        epoch, number, _ = whole[start]
        assert batches(epoch, number, 3, 60 - start) == whole[start:]
    epochs = [[batch for number, _, batch in whole if number == epoch] for epoch in (0, 1)]
    assert epochs[0] != epochs[1]
    assert batches(0, 0, 4, 60) != whole


def test_initial_weights_are_a_function_of_the_seed_alone(tiny_tokenizer) -> None:
    state = torch.random.get_rng_state()
    weights = [
        new_model(dataclasses.replace(CONFIG, seed=seed), tiny_tokenizer).model.embed_tokens.weight
        for seed in (7, 7, 8)
    ]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 8}, "`seed` 7, expected 8"),
        ({"base_learning_rate": 0.4}, "`base_learning_rate` 0.3, expected 0.4"),
        ({"width": 32}, "`width` 16, expected 32"),
        ({"optimizer": "adamw"}, "`optimizer` adafactor, expected adamw"),
        ({"batch_tokens": 97}, "`batch_tokens` 96, expected 97"),
        ({"steps": 9}, "10 steps are made, expected at most 9"),
    ],
)
def test_other_settings_are_refused_by_name(change: dict, named: str, run_folder: Path) -> None:
    with pytest.raises(PretrainingError, match=named):
        pretrain(SENTENCES, run_folder, dataclasses.replace(CONFIG, **change))


def test_another_corpus_or_tokenizer_is_refused(run_folder: Path, tiny_tokenizer) -> None:
    with pytest.raises(PretrainingError, match="a corpus of digest"):
        pretrain([*SENTENCES[:-1], "Another."], run_folder, CONFIG)
    with pytest.raises(PretrainingError, match="a tokenizer of digest"):
        pretrain(SENTENCES, run_folder, CONFIG, tokenizer=tiny_tokenizer)


def test_finished_run_is_not_changed(run_folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run_folder.rglob("*") if path.name != LOCK_FILE}
    assert pretrain(SENTENCES, run_folder, CONFIG) == run_folder / "checkpoint-000010"
    assert {path: path.stat().st_mtime_ns for path in run_folder.rglob("*") if path.name != LOCK_FILE} == before


def test_second_process_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    with (
        filelock.FileLock(tmp_path / LOCK_FILE),
        pytest.raises(PretrainingError, match="another process is training in it"),
    ):
        pretrain(SENTENCES, tmp_path, CONFIG)


def test_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(PretrainingError, match=r"holds thesis\.txt, expected an empty folder"):
        pretrain(SENTENCES, tmp_path, CONFIG)


def test_loss_that_is_not_finite_is_one_line(tmp_path: Path) -> None:
    config = dataclasses.replace(ADAMW, base_learning_rate=1e30, warmup_steps=1)
    with pytest.raises(PretrainingError, match=r"^step \d+: the loss is (nan|inf), expected a finite") as error:
        pretrain(SENTENCES, tmp_path / "run", config)
    assert "\n" not in str(error.value)


def test_corpus_without_a_token_to_predict_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PretrainingError, match="no record has a token to predict"):
        pretrain(["", ""], tmp_path / "run", CONFIG)


def _damage_state(folder: Path) -> None:
    (folder / "training_state.json").write_text("{")


def _damage_weights(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])


def _damage_optimizer(folder: Path) -> None:
    tensors = load_file(folder / "optimizer.safetensors")
    tensors.pop("exp_avg_sq_row/model.layers.0.mlp.up_proj.weight")
    save_file(tensors, folder / "optimizer.safetensors")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (_damage_state, "training_state.json"),
        (_damage_weights, "model.safetensors"),
        (_damage_optimizer, "optimizer.safetensors: holds .* of model.layers.0.mlp.up_proj.weight"),
        (lambda folder: (folder / "optimizer.safetensors").unlink(), "optimizer.safetensors: cannot be read"),
    ],
    ids=["state", "weights", "optimizer", "no-optimizer"],
)
def test_damaged_checkpoint_is_named_and_the_previous_one_can_be_used(damage, named: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    pretrain(SENTENCES, out, dataclasses.replace(CONFIG, steps=2, checkpoint_steps=1))
    damage(out / "checkpoint-000002")
    with pytest.raises(PretrainingError, match=f"{named}.*delete its folder to resume") as error:
        pretrain(SENTENCES, out, dataclasses.replace(CONFIG, steps=3))
    assert "\n" not in str(error.value)


def test_full_disk_is_one_line_and_keeps_earlier_checkpoints(tmp_path, monkeypatch) -> None:
    import trackstar.pretraining.checkpoints as checkpoints

    original = checkpoints.save_file

    def full(tensors, path, metadata):
        if "000006" in str(path):
            raise OSError(28, "No space left on device")
        original(tensors, path, metadata=metadata)

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(PretrainingError, match=r"checkpoint-000006: cannot be written \(No space left on device\)"):
        pretrain(SENTENCES, tmp_path / "run", CONFIG)
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint*")) == [
        "checkpoint-000000",
        "checkpoint-000003",
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"width": 18, "heads": 6},
        {"width": 16, "heads": 3},
        {"key_value_heads": 3},
        {"layers": 0},
        {"steps": 0},
        {"vocabulary": 100},
        {"base_learning_rate": float("nan")},
        {"base_learning_rate": 0.0},
        {"seed": -1},
    ],
)
def test_invalid_settings_are_named(change: dict) -> None:
    with pytest.raises(OptionError, match=next(iter(change))):
        dataclasses.replace(CONFIG, **change)
