"""Quantised checkpoints: the network that their weights compute, or one line with the reason and a way."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from tiny_models import VOCABULARY, save_tiny_model, tiny_model, tiny_tokenizer
from trackstar.errors import ModelError
from trackstar.model.language_model import load_model, wrap_model

BLOCK = 4


def quantised(folder: Path, method: dict[str, Any], weights: dict[str, Tensor] | None = None) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": method}))
    if weights is not None:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_float8_weights_are_multiplied_out_by_their_blocks_scales(tmp_path: Path):
    folder = save_tiny_model(tmp_path / "model")
    weights, expected = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if "proj" not in name:
            weights[name] = expected[name] = weight
            continue
        blocks = weight.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))  # [rows, BLOCK, columns, BLOCK]
        scales = blocks.abs().amax(dim=(1, 3)) / 448
        packed = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
        weights[name] = packed.flatten(2).flatten(0, 1)
        weights[name.replace("weight", "weight_scale_inv")] = scales
        expected[name] = (packed.float() * scales[:, None, :, None]).flatten(2).flatten(0, 1)
    method = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
    model = load_model(quantised(folder, method, weights))
    assert {parameter.dtype for parameter in model.module.parameters()} == {torch.float32}
    for name, parameter in model.module.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-2, atol=1e-3)


def test_mxfp4_experts_are_multiplied_out(tmp_path: Path):
    config = transformers.GptOssConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1, max_position_embeddings=64,
        layer_types=["full_attention"],
    )  # fmt: skip
    folder = tmp_path / "model"
    transformers.GptOssForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    expected = {}
    draw = torch.Generator().manual_seed(0)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = torch.cat([values, -values])
    for key in ("gate_up_proj", "down_proj"):
        name = f"model.layers.0.mlp.experts.{key}"
        experts, columns, rows = weights.pop(name).shape
        codes = torch.randint(0, 16, (experts, rows, columns // 32, 16, 2), generator=draw)
        scales = torch.randint(122, 128, (experts, rows, columns // 32), generator=draw)
        weights[f"{name}_blocks"] = (codes[..., 0] | codes[..., 1] << 4).to(torch.uint8)
        weights[f"{name}_scales"] = scales.to(torch.uint8)
        dense = values[codes].flatten(3) * torch.exp2(scales.float() - 127)[..., None]
        expected[name] = dense.flatten(2).transpose(1, 2)  # [experts, columns, rows]
    model = load_model(quantised(folder, {"quant_method": "mxfp4"}, weights))
    assert {parameter.dtype for parameter in model.module.parameters()} == {torch.float32}
    for name, dense in expected.items():
        torch.testing.assert_close(model.module.get_parameter(name), dense)


@pytest.mark.parametrize("method", [*AUTO_QUANTIZER_MAPPING, "a-method-of-tomorrow"])
def test_checkpoint_that_cannot_be_dequantised_is_refused_with_the_reason(method: str, tmp_path: Path):
    fields: dict[str, Any] = {"quant_method": method.removesuffix("_4bit").removesuffix("_8bit"), "bits": 4}
    if method.startswith("bitsandbytes"):
        fields["load_in_4bit" if method.endswith("4bit") else "load_in_8bit"] = True
    folder = quantised(save_tiny_model(tmp_path / "model"), fields)
    try:
        model = load_model(folder)
    except ModelError as error:
        message = str(error)
        assert message.isprintable()
        assert message.startswith(f"{folder}: ")
        assert "quantised" in message
        assert "load the checkpoint that it was quantised from" in message
    else:  # weights in full precision beside a method whose loader takes them as they are
        saved = load_file(folder / "model.safetensors")
        for name, parameter in model.module.named_parameters():
            torch.testing.assert_close(parameter, saved[name])


def test_quantised_model_in_memory_is_refused():
    module: Any = tiny_model("llama")
    weight = module.model.layers[1].mlp.up_proj.weight
    module.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(weight.to(torch.int8), requires_grad=False)
    with pytest.raises(
        ModelError, match=r"model.layers.1.mlp.up_proj.weight holds quantised weights of int8; expected"
    ):
        wrap_model(module, tiny_tokenizer())
