"""A model spread over several devices: the devices of its tensors, tested without GPUs.

`FakeTensorMode` computes on tensors without values and, like GPUs, refuses products of tensors on two
devices; `cpu` and `meta` stand for two GPUs.
"""

import copy
import dataclasses
from typing import Any

import accelerate
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from comparisons import language_model
from trackstar.errors import ModelError, OptionError
from trackstar.gradients.estimated_moment import FactoredSquares
from trackstar.gradients.per_example import gradient_pass
from trackstar.gradients.projection import ProjectedGradients
from trackstar.gradients.second_moment import NO_SECOND_MOMENT
from trackstar.model.batching import Batch
from trackstar.model.language_model import LanguageModel
from trackstar.model.loading import spread_over_gpus


def layer_places(module: nn.Module, first: str, second: str) -> dict[str, str]:
    """Embeddings and the first layers on one device, the later layers, the norm and the head on another."""
    layers = len(module.get_submodule("model.layers"))  # pyright: ignore[reportArgumentType]
    places = {f"model.layers.{n}": first if n < layers // 2 else second for n in range(layers)}
    return {"model.embed_tokens": first, **places, "model.norm": second, "model.rotary_emb": first, "lm_head": second}


def spread(model: LanguageModel, first: str, second: str) -> LanguageModel:
    """The model with its modules moved to two devices."""
    places = layer_places(model.module, first, second)
    for name, place in places.items():
        model.module.get_submodule(name).to(place)

    def moved(place: str):
        def hook(_module: nn.Module, arguments: Any, options: Any) -> Any:
            return accelerate.utils.send_to_device(arguments, place), accelerate.utils.send_to_device(options, place)

        return hook

    # As `accelerate.dispatch_model` does: each module moves its arguments to its device.
    for name, place in places.items():
        model.module.get_submodule(name).register_forward_pre_hook(moved(place), with_kwargs=True)  # pyright: ignore[reportArgumentType]
    head = model.module.get_output_embeddings()
    assert head is not None
    return dataclasses.replace(model, head=dataclasses.replace(model.head, weight=head.weight))


def test_every_product_is_of_tensors_on_one_device():
    model = language_model("llama")
    model = dataclasses.replace(model, module=copy.deepcopy(model.module))  # the cached model is shared
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = spread(model, "cpu", "meta")
        assert model.device == torch.device("meta")
        for consumer in (ProjectedGradients(model, NO_SECOND_MOMENT, side=4), FactoredSquares(model)):
            token_ids = torch.ones(2, 5, dtype=torch.int64, device="cpu")
            consumer.start(Batch(token_ids=token_ids, target_mask=token_ids.bool(), indices=(0, 1)))
            with gradient_pass(model, consumer):
                hidden = model.hidden_states(token_ids)
                assert hidden.device == torch.device("meta")
                hidden.backward(torch.ones_like(hidden))
            if isinstance(consumer, ProjectedGradients):
                found = consumer.result()
                assert found.shape == (2, consumer.dimensions)
                assert found.device == torch.device("meta")
            else:
                consumer.commit()
                consumer.sums()
        with pytest.raises(OptionError, match="tail-patch: needs a model on one device, found one spread over 2"):
            model.check_on_one_device("tail-patch")


def test_a_model_too_large_for_all_gpus_is_refused(monkeypatch: pytest.MonkeyPatch):
    model = language_model("llama")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(accelerate.utils, "get_balanced_memory", lambda *_, **__: {0: 1000, 1: 1000, "cpu": 10**9})
    with pytest.raises(ModelError, match=r'tiny: does not fit on this machine.s 2 GPUs; .*`dtype="bfloat16"`'):
        spread_over_gpus(model.module, "tiny")


def test_without_a_gpu_a_model_is_not_moved():
    model = language_model("llama")
    spread_over_gpus(model.module, "tiny")
    assert model.device == torch.device("cpu")
