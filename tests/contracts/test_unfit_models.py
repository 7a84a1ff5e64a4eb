"""A model, a tokenizer and texts that do not fit each other: one line that names the cause, at once."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny_models import VOCABULARY, save_tiny_model, tiny_model, tiny_tokenizer
from trackstar.attribution.answering import answer_queries
from trackstar.attribution.streaming import stream_queries
from trackstar.baselines.trak import mean_target_probabilities
from trackstar.corpus import Query
from trackstar.errors import GradientError, ModelError, SecondMomentError, TrackstarError
from trackstar.indexing.build import build_index
from trackstar.model.generation import generate
from trackstar.model.language_model import LanguageModel, load_model, wrap_model

TEXTS = ["The capital of France is Paris.", "Berlin is in Germany.", "Gold is Au."]
NEW_TOKEN = "<new>"
SETTINGS: dict[str, Any] = {"layer_blocks": 1, "side": 4, "codec": "float16", "progress": False}
QUICK_SECONDS = 10.0


def refusal(action: Callable[[], object], kind: type[TrackstarError] = ModelError) -> str:
    """The one-line message of a refusal that comes quickly."""
    start = time.monotonic()
    with pytest.raises(kind) as caught:
        action()
    assert time.monotonic() - start < QUICK_SECONDS
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 600
    return message


def edit_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# ---- Tokens without an embedding -----------------------------------------------------------------------------------


@pytest.fixture
def larger_tokenizer(tmp_path: Path) -> LanguageModel:
    """A model whose tokenizer has one token more than the model."""
    tokenizer = type(tiny_tokenizer()).from_pretrained(save_tiny_model(tmp_path / "model"))
    tokenizer.add_tokens([NEW_TOKEN])
    assert len(tokenizer) == VOCABULARY + 1
    return wrap_model(tiny_model("llama"), tokenizer)


def test_only_tokens_that_occur_need_an_embedding(larger_tokenizer: LanguageModel, tmp_path: Path):
    index = build_index(larger_tokenizer, TEXTS, tmp_path / "index", **SETTINGS)
    assert index.rows == len(TEXTS)


def test_token_without_an_embedding_is_named_wherever_texts_are_tokenized(
    larger_tokenizer: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model, texts = larger_tokenizer, [*TEXTS, f"Lead is {NEW_TOKEN}."]
    index = build_index(model, TEXTS, tmp_path / "index", second_moment="none", **SETTINGS)
    bad = Query(query_id="q7", prompt="Lead is", completion=NEW_TOKEN)
    good = Query(query_id="q8", prompt="Gold is", completion="Au.")
    ways: dict[str, tuple[str, Callable[[], object]]] = {
        "V": ("example:3", lambda: build_index(model, texts, tmp_path / "a", **SETTINGS)),
        "index": ("example:3", lambda: build_index(model, texts, tmp_path / "b", second_moment="none", **SETTINGS)),
        "stream": ("example:3", lambda: stream_queries(model, texts, [good], side=4, progress=False)),
        "query": ("q7", lambda: answer_queries(index, [bad], model=model, progress=False)),
        "task": ("q7", lambda: answer_queries(index, [good], model=model, task=[bad], progress=False)),
        "prompt": ("prompt", lambda: generate(model, f"Lead {NEW_TOKEN}")),
    }
    for name, way in ways.values():
        assert refusal(way) == (
            f'{name}: token 300 ("{NEW_TOKEN}") has no embedding: the model has 300 tokens, and the tokenizer 301; '
            "expected the tokenizer that the model was trained with; if tokens were added to it, call "
            "`resize_token_embeddings` of the model, train it and save it again"
        )
    monkeypatch.setattr(LanguageModel, "vocabulary", 2)  # as if the stored tokens were of a larger model
    assert refusal(lambda: mean_target_probabilities(index, model)).startswith("example:0: token ")


# ---- Configurations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"num_hidden_layers": 10**6},
            "its config.json has num_hidden_layers 1000000, but its weights are 30 tensors; ",
        ),
        ({"num_hidden_layers": 0}, "its config.json has num_hidden_layers 0; expected 1 or more; restore the file"),
        ({"num_hidden_layers": -1}, "its config.json has num_hidden_layers -1; expected 1 or more"),
        (
            {"num_hidden_layers": 1},
            "its weights hold 18 parameters of layers that its configuration leaves out, first ",
        ),
        ({"num_hidden_layers": 4}, "its weights lack 9 parameters of LlamaForCausalLM, first model.layers.3."),
        (
            {"hidden_size": 10**9},
            "its config.json has hidden_size 1000000000, but the largest dimension of its weights is",
        ),
        (
            {"hidden_size": 48},
            "model.embed_tokens.weight has shape (300, 24) in the weights, but (300, 48) by config.json",
        ),
        ({"hidden_size": 0}, "its config.json has hidden_size 0; expected 1 or more"),
        ({"vocab_size": 0}, "its config.json has vocab_size 0; expected 1 or more"),
        (
            {"vocab_size": 10**12},
            "its config.json has vocab_size 1000000000000, but the largest dimension of its weights",
        ),
        (
            {"vocab_size": 200},
            "model.embed_tokens.weight has shape (300, 24) in the weights, but (200, 24) by config.json",
        ),
        ({"num_attention_heads": 0}, "its config.json has num_attention_heads 0; expected 1 or more"),
        ({"max_position_embeddings": -5}, "its config.json has max_position_embeddings -5; expected 1 or more"),
        ({"head_dim": 10**9}, "q_proj.weight has shape (24, 24) in the weights, but (4000000000, 24) by config.json"),
    ],
    ids=str,
)
def test_configuration_that_does_not_fit_the_weights_is_refused_before_anything_is_allocated(
    fields: dict[str, Any], message: str, tmp_path: Path
):
    edit_config(save_tiny_model(tmp_path / "model"), **fields)
    found = refusal(lambda: load_model(tmp_path / "model"))
    assert found.startswith(f"{tmp_path / 'model'}: ")
    assert message in found


def test_missing_and_damaged_shards_are_named(tmp_path: Path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(tmp_path)
    load_model(tmp_path)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    content = shards[1].read_bytes()
    for damaged in (
        b"",
        content[:100],
        (2**62).to_bytes(8, "little") + content[8:],
        content[:8] + b"\xff" + content[9:],
    ):
        shards[1].write_bytes(damaged)
        assert refusal(lambda: load_model(tmp_path)).startswith(
            f"{tmp_path}: cannot be loaded as a causal language model ("
        )
    shards[1].unlink()
    assert shards[1].name in refusal(lambda: load_model(tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text("{")
    assert refusal(lambda: load_model(tmp_path)).startswith(
        f"{tmp_path}: cannot be loaded as a causal language model ("
    )


def _write_gguf(path: Path, layers: int) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_embedding_length(8)
    writer.add_tensor("token_embd.weight", np.zeros((32, 8), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_broken_gguf_files_are_refused_at_once(tmp_path: Path):
    path = tmp_path / "m.gguf"
    _write_gguf(path, 10**6)
    assert "m.gguf has llama.block_count 1000000, but 1 tensors; expected one or more" in refusal(
        lambda: load_model(path)
    )
    content = path.read_bytes()
    counts = [content[:at] + (2**40).to_bytes(8, "little") + content[at + 8 :] for at in (8, 16)]
    for broken in (b"", content[:30], content[:-40], *counts):
        path.write_bytes(broken)
        assert "m.gguf is not a whole GGUF file (" in refusal(lambda: load_model(path)).replace(":", " (")


# ---- Weights and texts that give no gradient -----------------------------------------------------------------------


def _matrices(change: Callable[[torch.Tensor], object]) -> Callable[[dict[str, torch.Tensor]], None]:
    def changed(weights: dict[str, torch.Tensor]) -> None:
        for name, weight in weights.items():
            if "layers" in name and weight.ndim == 2:
                change(weight)

    return changed


def test_zero_weights_are_named_and_not_the_second_moment(tmp_path: Path):
    folder = save_tiny_model(tmp_path / "model")
    edit_weights(folder, _matrices(torch.Tensor.zero_))
    message = refusal(lambda: build_index(str(folder), TEXTS, tmp_path / "new", **SETTINGS), SecondMomentError)
    assert message.startswith(f"{folder}: 21 of its 30 parameters are zero throughout, first model.layers.0.")
    assert message.endswith('expected trained weights; load another checkpoint, or pass `second_moment="none"`')


@pytest.mark.parametrize("value", [1e30, 1e38])
def test_weights_that_overflow_are_named_and_not_the_second_moment(value: float, tmp_path: Path):
    folder = save_tiny_model(tmp_path / "model")
    edit_weights(folder, lambda weights: weights["model.layers.1.mlp.up_proj.weight"].fill_(value))
    message = refusal(lambda: build_index(str(folder), TEXTS, tmp_path / "new", **SETTINGS), TrackstarError)
    assert f"the largest weight is {value:.3g}, in model.layers.1.mlp.up_proj.weight" in message


def test_loss_that_is_not_finite_names_the_example_and_the_loss(tmp_path: Path):
    folder = save_tiny_model(tmp_path / "model", "gpt_neox")
    token = tiny_tokenizer("plain")("Gold")["input_ids"][0]
    edit_weights(folder, lambda weights: weights["gpt_neox.embed_in.weight"][token].fill_(3e38))
    message = refusal(lambda: build_index(str(folder), TEXTS, tmp_path / "new", **SETTINGS), GradientError)
    assert message.startswith("example:2: its loss is nan, expected finite numbers; the largest weight is 3e+38, in ")


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (
            [" ", " "],
            "the longest of the 2 texts that V is estimated from has 2 tokens, of which one precedes the other",
        ),
        (["a", "b", "c"], "the longest of the 3 texts that V is estimated from has 2 tokens, of which one precedes"),
    ],
)
def test_texts_that_give_no_gradient_are_named_and_not_the_second_moment(
    texts: list[str], message: str, tmp_path: Path
):
    folder = save_tiny_model(tmp_path / "model")
    found = refusal(lambda: build_index(str(folder), texts, tmp_path / "new", **SETTINGS), SecondMomentError)
    assert found.startswith(message)
    settings = {**SETTINGS, "second_moment": "none"}
    assert build_index(str(folder), texts, tmp_path / "new", **settings).rows == len(texts)
