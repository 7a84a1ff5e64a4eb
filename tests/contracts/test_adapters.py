"""PEFT adapters wherever a model is named: what is recorded, and one line for what cannot be attributed."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters import adapted, adapted_tiny_model, lora, save_adapter, wrapped
from tiny_models import VOCABULARY, save_tiny_model, tiny_model, tiny_tokenizer
from trackstar.attribution.answering import answer_queries
from trackstar.attribution.streaming import stream_queries
from trackstar.choices import Parameters
from trackstar.cli import main
from trackstar.corpus import Query
from trackstar.editing.adding import add_examples
from trackstar.errors import IndexMismatchError, ModelError, OptionError, SecondMomentError, TrackstarError
from trackstar.indexing.build import build_index
from trackstar.model.language_model import load_model, wrap_model
from trackstar.store import Index
from trackstar.workers.index_model import model_of_index

# PEFT itself calls what Transformers deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

TEXTS = ["The capital of France is Paris.", "Berlin is in Germany.", "Gold is Au.", "In Osaka they speak Japanese."]
SETTINGS: dict[str, Any] = {"layer_blocks": 1, "side": 4, "codec": "float16", "progress": False}
QUESTION = Query(query_id="q", prompt="The capital of France is", completion="Paris.")


@pytest.fixture(scope="module")
def adapter_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter's folder beside its base model's; do not change its files."""
    return save_adapter(tmp_path_factory.mktemp("adapted"))


@pytest.fixture
def own_folder(adapter_folder: Path, tmp_path: Path) -> Path:
    """A copy of the adapter's folder."""
    return Path(shutil.copytree(adapter_folder, tmp_path / "own"))


def refusal(action: Callable[[], object], kind: type[TrackstarError] = ModelError) -> str:
    with pytest.raises(kind) as caught:
        action()
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 900
    return message


def edit_config(folder: Path, **fields: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# ---- A live model stays as it is -----------------------------------------------------------------------------------


def state_of(module: Any) -> dict[str, Any]:
    return {
        "parameters": {name: (id(p), p.requires_grad, p.detach().clone()) for name, p in module.named_parameters()},
        "modules": [(name, id(child), child.training) for name, child in module.named_modules()],
        "hooks": [len(c._forward_hooks) + len(c._forward_pre_hooks) + len(c._backward_hooks) for c in module.modules()],
        "active": list(module.active_adapters),
    }


@pytest.mark.parametrize("parameters", ["merged", "adapter"])
@pytest.mark.parametrize("training", [True, False])
def test_a_live_model_is_left_exactly_as_it_was(training: bool, parameters: Parameters, tmp_path: Path):
    module = adapted_tiny_model(lora(modules_to_save=["lm_head"], lora_dropout=0.1)).train(training)
    before = state_of(module)
    model = wrapped(module, parameters=parameters, layer_blocks=1)
    index = build_index(model, TEXTS, tmp_path / "index", side=4, codec="float16", progress=False)
    answer_queries(index, [QUESTION], model=model, k=1, progress=False)
    after = state_of(module)
    for name, (identity, requires_grad, values) in before["parameters"].items():
        assert after["parameters"][name][:2] == (identity, requires_grad), name
        assert torch.equal(after["parameters"][name][2], values), name
    assert after["modules"] == before["modules"]
    assert after["hooks"] == before["hooks"]
    assert after["active"] == before["active"]


def test_a_transformers_model_with_an_adapter_loaded_into_it_is_the_same_network(adapter_folder: Path):
    from transformers import AutoModelForCausalLM

    live = AutoModelForCausalLM.from_pretrained(adapter_folder)
    for parameters in ("merged", "adapter"):
        model = wrapped(live, parameters=parameters)
        assert model.digest() == load_model(adapter_folder, parameters=parameters).digest()
        assert model.parameters == parameters


def test_a_live_adapter_of_any_name_has_the_names_and_the_digest_of_its_folder(tmp_path: Path):
    from peft import PeftModel

    folder = save_adapter(tmp_path)
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    live = PeftModel.from_pretrained(base, str(folder), adapter_name="tuned")
    for parameters in ("merged", "adapter"):
        model, loaded = wrapped(live, parameters=parameters), load_model(folder, parameters=parameters, layer_blocks=2)
        assert model.matrix_shapes == loaded.matrix_shapes
        assert model.digest() == loaded.digest()


def test_of_several_adapters_the_active_one_counts(tmp_path: Path):
    live = adapted_tiny_model()
    alone = {parameters: wrapped(live, parameters=parameters).digest() for parameters in ("merged", "adapter")}
    live.add_adapter("other", lora(r=2))
    for parameters, digest in alone.items():
        assert wrapped(live, parameters=parameters).digest() == digest
    live.base_model.set_adapter(["default", "other"])
    assert "found 2 active adapters (default, other), expected one" in refusal(lambda: wrapped(live))
    live.set_adapter("other")
    assert wrapped(live).digest() not in alone.values()


@pytest.mark.parametrize("parameters", ["merged", "adapter"])
def test_an_adapter_that_takes_no_part_is_refused_and_the_advice_works(parameters: Parameters):
    live = adapted_tiny_model()
    live.base_model.disable_adapter_layers()
    message = refusal(lambda: wrapped(live, parameters=parameters))
    assert "is disabled" in message
    assert "`enable_adapter_layers()`" in message
    live.base_model.enable_adapter_layers()
    wrapped(live, parameters=parameters)
    live.merge_adapter()
    message = refusal(lambda: wrapped(live, parameters=parameters))
    assert "call `unmerge_adapter()`" in message
    live.unmerge_adapter()
    wrapped(live, parameters=parameters)
    assert wrapped(live.merge_and_unload()).parameters is None


# ---- Folders -------------------------------------------------------------------------------------------------------


def test_base_model_is_found_from_the_adapters_folder_and_from_the_working_directory(
    own_folder: Path, adapter_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    digest = load_model(adapter_folder).digest()
    shutil.copytree(adapter_folder.parent / "base", own_folder / "inside")
    edit_config(own_folder, base_model_name_or_path="inside")
    assert load_model(own_folder).digest() == digest
    (own_folder / "inside").rename(tmp_path / "elsewhere")
    edit_config(own_folder, base_model_name_or_path="../elsewhere")
    assert load_model(own_folder).digest() == digest
    edit_config(own_folder, base_model_name_or_path="elsewhere")
    monkeypatch.chdir(tmp_path)
    assert load_model(own_folder).digest() == digest


@pytest.mark.parametrize("written", [None, "", "/gone/model", "no-such-model"])
def test_a_missing_base_model_is_named_and_the_advice_works(
    written: str | None, own_folder: Path, adapter_folder: Path
):
    edit_config(own_folder, base_model_name_or_path=written)
    message = refusal(lambda: load_model(own_folder))
    advice = (
        f"set base_model_name_or_path in {own_folder / 'adapter_config.json'} to the base model's folder or hub name"
    )
    assert message.endswith(advice)
    edit_config(own_folder, base_model_name_or_path=str(adapter_folder.parent / "base"))
    assert load_model(own_folder).digest() == load_model(adapter_folder).digest()


def test_an_adapter_of_an_adapter_is_refused(own_folder: Path, adapter_folder: Path):
    edit_config(own_folder, base_model_name_or_path=str(adapter_folder))
    assert "is an adapter itself, expected a whole model" in refusal(lambda: load_model(own_folder))


def test_the_adapters_own_tokenizer_comes_before_the_base_models(own_folder: Path, adapter_folder: Path):
    base = load_model(adapter_folder).tokenizer_digest()
    tokenizer = type(tiny_tokenizer()).from_pretrained(adapter_folder.parent / "base")
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(own_folder)
    assert load_model(own_folder).tokenizer.convert_tokens_to_ids("<tool>") == VOCABULARY
    assert load_model(own_folder).tokenizer_digest() != base


@pytest.mark.parametrize("trained", [True, False])
def test_embeddings_that_were_added_in_tuning_are_loaded(trained: bool, tmp_path: Path):
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / "base"))
    base.resize_token_embeddings(VOCABULARY + 3, mean_resizing=False)
    live = adapted(base, lora(modules_to_save=["embed_tokens", "lm_head"] if trained else None))
    live.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    for parameters in ("merged", "adapter"):
        model = load_model(tmp_path / "adapter", parameters=parameters)
        assert model.vocabulary == VOCABULARY + 3
        tokens = torch.tensor([[5, VOCABULARY, VOCABULARY + 2, 9]])
        with torch.no_grad():
            torch.testing.assert_close(model.module(tokens).logits, live(tokens).logits, rtol=1e-4, atol=1e-4)


def test_added_embeddings_without_their_head_are_refused(tmp_path: Path):
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / "base"))
    base.resize_token_embeddings(VOCABULARY + 3, mean_resizing=False)
    adapted(base, lora(modules_to_save=["embed_tokens"])).save_pretrained(
        tmp_path / "adapter", save_embedding_layers=False
    )
    message = refusal(lambda: load_model(tmp_path / "adapter"))
    assert "was trained with 303 tokens, its base model has 300, and its weights lack the output embeddings" in message


def test_damaged_and_foreign_adapters_have_one_line(own_folder: Path, adapter_folder: Path, tmp_path: Path):
    weights = load_file(adapter_folder / "adapter_model.safetensors")
    first = next(iter(weights))

    def written(tensors: dict[str, torch.Tensor]) -> str:
        save_file(tensors, own_folder / "adapter_model.safetensors")
        return refusal(lambda: load_model(own_folder))

    assert "its weights lack base_model.model." in written({k: v for k, v in weights.items() if k != first})
    assert "its weights hold base_model.model.nowhere" in written(
        {**weights, "base_model.model.nowhere": torch.ones(2)}
    )
    assert "does not fit its base model" in written({**weights, first: torch.ones(3, 5)})
    (own_folder / "adapter_model.safetensors").write_bytes(b"damaged")
    assert "is not a whole safetensors file" in refusal(lambda: load_model(own_folder))
    (own_folder / "adapter_model.safetensors").rename(own_folder / "adapter_model.bin")
    assert "found adapter_model.bin, expected adapter_model.safetensors" in refusal(lambda: load_model(own_folder))
    for text, expected in (("{", "cannot be read"), ("[]", "expected a JSON object"), ('{"peft_type": "NEW"}', "NEW")):
        fields = text if text != '{"peft_type": "NEW"}' else json.dumps(
            {"peft_type": "NEW", "base_model_name_or_path": str(adapter_folder.parent / "base")}
        )  # fmt: skip
        save_file(weights, own_folder / "adapter_model.safetensors")
        (own_folder / "adapter_config.json").write_text(fields)
        assert expected in refusal(lambda: load_model(own_folder))


@pytest.mark.parametrize("fields", [{"r": 10**12}, {"r": 0}, {"rank_pattern": {"q_proj": 10**12}}])
def test_a_rank_that_the_weights_cannot_have_is_refused_at_once(fields: dict[str, Any], own_folder: Path):
    edit_config(own_folder, **fields)
    assert "the largest dimension of its weights" in refusal(lambda: load_model(own_folder))


def test_a_run_folder_names_its_checkpoints(adapter_folder: Path, tmp_path: Path):
    shutil.copytree(adapter_folder, tmp_path / "run" / "checkpoint-3")
    message = refusal(lambda: load_model(tmp_path / "run"))
    assert f"such as {tmp_path / 'run' / 'checkpoint-3'}" in message


def test_without_peft_a_line_says_how_to_install_it(adapter_folder: Path, monkeypatch: pytest.MonkeyPatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else found(name, *rest))
    assert refusal(lambda: load_model(adapter_folder)).endswith("pip install 'trackstar-tda[peft]'")


def test_a_task_that_is_no_language_model_is_refused(own_folder: Path):
    edit_config(own_folder, task_type="SEQ_CLS")
    assert "has task_type 'SEQ_CLS', expected CAUSAL_LM" in refusal(lambda: load_model(own_folder))


# ---- Methods -------------------------------------------------------------------------------------------------------


def prompt_methods() -> dict[str, Any]:
    import peft

    of_task = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    return {
        "PROMPT_TUNING": peft.PromptTuningConfig(**of_task),
        "PREFIX_TUNING": peft.PrefixTuningConfig(**of_task),
        "P_TUNING": peft.PromptEncoderConfig(**of_task, encoder_hidden_size=8),
    }


@pytest.mark.parametrize("method", ["PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING"])
def test_methods_that_change_no_weights_are_refused_with_a_way(method: str, tmp_path: Path):
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / "base"))
    live = get_peft_model(base, prompt_methods()[method])
    live.save_pretrained(tmp_path / "adapter")
    for action in (lambda: wrapped(live), lambda: load_model(tmp_path / "adapter")):
        message = refusal(action)
        assert f"{method} adapter changes no weights" in message
        assert message.endswith("the base model alone")
    load_model(tmp_path / "base")


def other_methods() -> dict[str, Any]:
    import peft

    return {
        "DoRA": lora(use_dora=True),
        "IA3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "LoHa": peft.LoHaConfig(target_modules=["q_proj"], r=4),
        "AdaLoRA": peft.AdaLoraConfig(target_modules=["q_proj"], init_r=4, total_step=10),
    }


@pytest.mark.parametrize("method", ["DoRA", "IA3", "LoHa", "AdaLoRA"])
def test_adapters_of_other_parameters_than_matrices_are_refused_and_the_advice_works(method: str):
    live = adapted_tiny_model(other_methods()[method])
    message = refusal(lambda: wrapped(live, parameters="adapter"))
    assert "which is no matrix of a linear layer" in message
    assert 'pass `parameters="merged"`' in message
    wrapped(live, parameters="merged")


def test_trained_parameters_that_are_left_out_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    live = adapted_tiny_model(lora(modules_to_save=["lm_head"], target_modules=["q_proj", "embed_tokens"], bias="none"))
    model = wrapped(live, parameters="adapter", layer_blocks=1)
    assert [name.split(".default")[0] for name in model.coverage.left_out] == [
        "model.embed_tokens.lora_embedding_A",
        "model.embed_tokens.lora_embedding_B",
        "lm_head.modules_to_save",
    ]
    build_index(model, TEXTS, tmp_path / "index", side=4, codec="float16", second_moment="none")
    shown = capsys.readouterr().err
    for name in model.coverage.left_out:
        assert name in shown
    assert Index.open(tmp_path / "index").manifest.coverage.left_out == model.coverage.left_out


def test_a_layer_that_was_trained_whole_is_a_matrix_of_its_block():
    live = adapted_tiny_model(lora(target_modules=["q_proj"], modules_to_save=["down_proj"]))
    names = [matrix.name for matrix in wrapped(live, parameters="adapter").matrices]
    assert "model.layers.0.mlp.down_proj.modules_to_save" in names
    assert len(names) == 3 * 3


def test_an_untrained_adapter_has_its_line_and_the_advice_works(tmp_path: Path):
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fresh = get_peft_model(tiny_model("llama"), lora())
    untrained = {name: tensor.clone() for name, tensor in fresh.base_model.model.state_dict().items()}
    model = wrapped(fresh, parameters="adapter", layer_blocks=1)
    settings: dict[str, Any] = {"side": 4, "codec": "float16", "progress": False}
    message = refusal(lambda: build_index(model, TEXTS, tmp_path / "a", **settings), SecondMomentError)
    assert "lora_B.default.weight" in message
    assert 'pass `second_moment="none"`' in message
    optimizer = torch.optim.AdamW([p for p in fresh.parameters() if p.requires_grad])
    tokens = torch.arange(3, 30)[None]
    fresh.eval()(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()  # its second moment of A is zero
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    message = refusal(
        lambda: build_index(model, TEXTS, tmp_path / "a", second_moment=tmp_path / "optimizer.pt", **settings),
        SecondMomentError,
    )
    assert "lora_A has NaN, infinite or negative entries or is zero throughout" in message
    assert message.endswith('or pass `second_moment="none"`')
    with torch.no_grad():
        fresh.base_model.model.load_state_dict(untrained)
    index = build_index(model, TEXTS, tmp_path / "a", second_moment="none", **settings)
    assert answer_queries(index, [QUESTION], model=model, k=1, progress=False).results


# ---- Indexes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parameters", ["merged", "adapter"])
def test_every_command_takes_an_adapter_and_keeps_the_recorded_choice(
    parameters: Parameters, adapter_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    corpus, queries = tmp_path / "corpus.jsonl", tmp_path / "queries.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    more = tmp_path / "more.jsonl"
    more.write_text(json.dumps({"text": "Lead is Pb, and tin is Sn."}) + "\n")
    queries.write_text(json.dumps({"prompt": QUESTION.prompt, "completion": QUESTION.completion}) + "\n")
    index = str(tmp_path / "index")
    commands = [
        f"index --model {adapter_folder} --parameters {parameters} --data {corpus} --out {index} --side 8 --seed 1",
        f"query {index} --queries {queries} --out {tmp_path / 'answers.jsonl'}",
        f"add {index} --data {more} --duplicate-ids number --out {tmp_path / 'larger'}",
        f"query --data {corpus} --model {adapter_folder} --parameters {parameters} --queries {queries} --side 8 --json",
        f"generate --model {adapter_folder} --queries {queries} --out {tmp_path / 'said.jsonl'} --samples 1",
    ]  # fmt: skip
    for command in commands:
        with pytest.raises(SystemExit) as ended:
            main(command.split())
        assert ended.value.code in (None, 0), capsys.readouterr().err
    manifest = Index.open(index).manifest
    assert manifest.model.parameters == parameters
    assert manifest.model.adapter is not None
    assert manifest.model.adapter["r"] == "4"
    assert manifest.model.digest == load_model(adapter_folder).digest()
    names = [matrix.name for block in manifest.layer_blocks for matrix in block.matrices]
    assert any(".lora_A" in name for name in names) == (parameters == "adapter")


def test_an_index_of_other_parameters_is_refused(adapter_folder: Path, tmp_path: Path):
    build_index(adapter_folder, TEXTS, tmp_path / "index", **SETTINGS)
    message = refusal(
        lambda: build_index(adapter_folder, TEXTS, tmp_path / "index", parameters="adapter", **SETTINGS),
        IndexMismatchError,
    )
    assert "the existing index has `parameters` 'merged', but 'adapter' was requested" in message
    other = load_model(adapter_folder, parameters="adapter", layer_blocks=1)
    message = refusal(
        lambda: answer_queries(tmp_path / "index", [QUESTION], model=other, progress=False), IndexMismatchError
    )
    assert "made with model.parameters merged, but" in message


def test_an_index_of_another_adapter_is_refused(adapter_folder: Path, own_folder: Path, tmp_path: Path):
    index = build_index(adapter_folder, TEXTS, tmp_path / "index", **SETTINGS)
    weights = load_file(adapter_folder / "adapter_model.safetensors")
    save_file({name: 1.01 * tensor for name, tensor in weights.items()}, own_folder / "adapter_model.safetensors")
    message = refusal(lambda: answer_queries(index, [QUESTION], model=own_folder, progress=False), IndexMismatchError)
    assert "model.digest" in message
    shutil.copy(adapter_folder / "adapter_model.safetensors", own_folder)
    edit_config(own_folder, lora_alpha=7)
    message = refusal(lambda: answer_queries(index, [QUESTION], model=own_folder, progress=False), IndexMismatchError)
    assert "model.adapter.lora_alpha 6, but" in message
    assert answer_queries(index, [QUESTION], model=adapter_folder, progress=False).results


def test_added_examples_have_the_recorded_parameters(adapter_folder: Path, tmp_path: Path):
    whole = build_index(
        adapter_folder, TEXTS, tmp_path / "whole", parameters="adapter", second_moment="none", **SETTINGS
    )
    build_index(adapter_folder, TEXTS[:2], tmp_path / "part", parameters="adapter", second_moment="none", **SETTINGS)
    added = add_examples(tmp_path / "part", TEXTS[2:], tmp_path / "added", duplicate_ids="number", progress=False)
    assert added.manifest.model == whole.manifest.model
    for row in range(len(TEXTS)):
        assert added.example(row).loss == pytest.approx(whole.example(row).loss, rel=1e-5)


def test_parameters_of_an_adapter_need_one(tmp_path: Path):
    folder = save_tiny_model(tmp_path / "model")
    for action in (
        lambda: load_model(folder, parameters="adapter"),
        lambda: wrap_model(tiny_model("llama"), tiny_tokenizer(), parameters="adapter"),
    ):
        assert refusal(action, OptionError).startswith("`parameters`: adapter needs a model with a PEFT adapter")
    build_index(folder, TEXTS, tmp_path / "index", **SETTINGS)
    entry = json.loads((tmp_path / "index" / "manifest.json").read_text())["model"]
    assert (entry["parameters"], entry["adapter"]) == (None, None)


# ---- V -------------------------------------------------------------------------------------------------------------


def state_beside(folder: Path) -> Path:
    """Optimizer state of the adapter, as the Trainer saves it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(
        json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    )
    live = PeftModel.from_pretrained(base, str(folder), is_trainable=True)
    optimizer = torch.optim.AdamW([p for p in live.parameters() if p.requires_grad], lr=1e-4)
    tokens = torch.arange(3, 30)[None]
    live(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    return folder / "optimizer.pt"


def test_state_of_the_adapters_training_is_not_taken_for_the_merged_networks(
    own_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    state = state_beside(own_folder)
    merged = build_index(own_folder, TEXTS, tmp_path / "merged", **{**SETTINGS, "progress": True})
    assert merged.manifest.second_moment.source.startswith("estimated from")
    assert f"{state} is of the adapter's matrices, not of the merged network's" in capsys.readouterr().err
    adapter = build_index(own_folder, TEXTS, tmp_path / "adapter", parameters="adapter", **SETTINGS)
    assert adapter.manifest.second_moment.source == f"{state} (Adam at step 1)"
    for asked in (state, own_folder):
        message = refusal(
            lambda: build_index(own_folder, TEXTS, tmp_path / "c", second_moment=asked, **SETTINGS),  # noqa: B023
            SecondMomentError,
        )
        assert 'pass `parameters="adapter"` for their gradients, or `second_moment="estimate"`' in message
    build_index(own_folder, TEXTS, tmp_path / "c", second_moment="estimate", **SETTINGS)
    build_index(own_folder, TEXTS, tmp_path / "d", second_moment=state, parameters="adapter", **SETTINGS)


def test_a_corpus_is_streamed_with_either_gradients(adapter_folder: Path):
    reports = [
        stream_queries(load_model(adapter_folder, parameters=p), TEXTS, [QUESTION], side=4, progress=False)
        for p in ("merged", "adapter")
    ]
    scores = [[one.influence for one in report.results[0].proponents] for report in reports]
    assert scores[0] != scores[1]


# ---- The hub -------------------------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def put_on_hub(cache: Path, name: str, folder: Path) -> None:
    """Write a folder into the hub's cache, as a download of its main branch leaves it."""
    repository = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)


def test_an_adapter_and_its_base_model_on_the_hub_are_loaded_by_name(
    own_folder: Path, adapter_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    edit_config(own_folder, base_model_name_or_path="someone/base")
    put_on_hub(tmp_path / "hub", "someone/base", adapter_folder.parent / "base")
    put_on_hub(tmp_path / "hub", "someone/adapter", own_folder)
    for parameters in ("merged", "adapter"):
        model = load_model("someone/adapter", parameters=parameters, layer_blocks=1)
        assert model.digest() == load_model(adapter_folder).digest()
        index = build_index(
            model, TEXTS, tmp_path / parameters, side=4, codec="float16", second_moment="none", progress=False
        )
        assert (index.manifest.model.source, index.manifest.model.location) == ("someone/adapter", "hub")
        assert index.manifest.model.revision == COMMIT
        assert answer_queries(index, [QUESTION], progress=False).results
    assert load_model("someone/base").parameters is None


# ---- What newcomers met --------------------------------------------------------------------------------------------


def test_an_adapter_in_float32_beside_a_base_in_bfloat16_is_indexed(tmp_path: Path):
    """As PEFT makes it: the adapter's weights are in float32 whatever the base's format."""
    from peft import get_peft_model

    base: Any = tiny_model("llama")
    live = get_peft_model(base.to(torch.bfloat16), lora())
    with torch.no_grad():
        for parameter in live.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2)
    assert {parameter.dtype for parameter in live.parameters()} == {torch.bfloat16, torch.float32}
    model = wrapped(live, parameters="adapter")
    index = build_index(model, TEXTS, tmp_path / "index", **SETTINGS)
    assert all(row > 0 for row in index.norms().tolist())


def test_an_adapter_that_trains_some_embeddings_is_indexed_in_both_ways(tmp_path: Path):
    live = adapted_tiny_model(lora(trainable_token_indices=[5, 6]))
    for parameters in ("merged", "adapter"):
        index = build_index(wrapped(live, parameters=parameters), TEXTS, tmp_path / parameters, **SETTINGS)
        assert all(row > 0 for row in index.norms().tolist())


def test_adaption_prompts_are_refused_as_they_change_no_weights(tmp_path: Path):
    from peft import AdaptionPromptConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / "base"))
    configuration = AdaptionPromptConfig(adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM")
    get_peft_model(base, configuration).save_pretrained(str(tmp_path / "adapter"))
    message = refusal(lambda: load_model(tmp_path / "adapter"))
    assert "changes no weights" in message
    assert "use the base model alone" in message
    load_model(tmp_path / "base")


def test_a_model_that_is_not_an_adapters_index_is_named_so(adapter_folder: Path, tmp_path: Path):
    model = load_model(adapter_folder, parameters="adapter", layer_blocks=2)
    index = build_index(model, TEXTS, tmp_path / "index", **SETTINGS)
    with pytest.raises(IndexMismatchError, match="has no adapter whose matrices are those that were indexed"):
        model_of_index(index, adapter_folder.parent / "base")
    model_of_index(index, adapter_folder)


def test_transformers_own_adapters_are_enabled_by_their_own_method():
    module = tiny_model("llama")
    module.add_adapter(lora())
    module.disable_adapters()
    message = refusal(lambda: wrapped(module))
    assert "call the model's `enable_adapters()`" in message
    module.enable_adapters()
    wrapped(module)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own, when it first compiles
def test_a_compiled_model_is_the_model_and_inference_mode_has_its_line():
    live = adapted_tiny_model()
    assert wrapped(torch.compile(live)).digest() == wrapped(live).digest()
    with torch.inference_mode():
        message = refusal(lambda: wrapped(live), OptionError)
    assert "leave it, or use `torch.no_grad()`" in message
    with torch.no_grad():
        wrapped(live)
