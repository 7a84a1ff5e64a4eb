"""PEFT adapters within a Transformers model: what they train, and the network that they make.

PEFT puts an adapter in place of the modules that it adapts. LoRA computes y = W a + s B (A a), with B of
shape [rows, r], A of shape [r, columns] and a factor s (Hu et al. 2021). Two kinds of gradients can be
taken of such a network:

    merged     of W + s B A, as if the network had been trained without an adapter
    adapter    of A and B, the matrices that were trained (as in LESS, Xia et al. 2024)

A merged network is any PEFT method's whose adapter can be written into the weights.
"""

import copy
import dataclasses
import json
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trackstar.choices import Parameters
from trackstar.corpus.digests import running_digest
from trackstar.errors import ModelError
from trackstar.text import one_line

_NOT_OF_THE_FUNCTION = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "ensure_weight_tying",
        "exclude_modules",
        "inference_mode",
        "init_lora_weights",
        "init_weights",
        "layers_pattern",
        "layers_to_transform",
        "megatron_config",
        "megatron_core",
        "modules_to_save",
        "peft_version",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
    }
)
"""Fields that decide nothing, or only which parameters there are, whose names are in the digest."""

_OF_TRAINING = ("dropout", "_config", "dropout_prob")

_MERGED = 'pass `parameters="merged"`, for gradients of the merged network\'s matrices'
_PROBED_TOKENS = 6


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """A model's PEFT adapter, and of which parameters gradients are taken.

    Attributes:
        parameters: `merged`, if it is written into the model's weights, or `adapter`, if it is in its place.
        name: Its name in the model, as in `q_proj.lora_A.NAME.weight`.
        configuration: The fields of its configuration that decide its function, as JSON texts by name.
        trained: Names of the model's parameters that it trains, in the model's order; none if it is merged.
        matrices: Paths of the linear layers that it trains, and their names without the adapter's; none
            if it is merged.
        digest: Digest of the model's weights and its own before they were merged; None if they are not.
    """

    parameters: Parameters
    name: str
    configuration: Mapping[str, str]
    trained: tuple[str, ...] = ()
    matrices: Mapping[str, str] = dataclasses.field(default_factory=dict)
    digest: str | None = None


def network_of(module: nn.Module) -> nn.Module:
    """The Transformers model in a `PeftModel`, with its adapters in place; any other module itself."""
    peft: Any = sys.modules.get("peft")  # nothing is a PeftModel before it is imported
    if peft is None or not isinstance(module, peft.PeftModel):
        return module
    wrapped: Any = module
    return wrapped.get_base_model()


def _enabling(module: nn.Module) -> str:
    """The method that enables the adapters: PEFT's, or that of Transformers' own adapters."""
    return "enable_adapters" if network_of(module) is module else "enable_adapter_layers"


def find_adapter(module: nn.Module, source: str) -> tuple[str, Any] | None:
    """Name and configuration of a model's active adapter; None if it has none.

    Args:
        module: A `PeftModel`, or a Transformers model with adapters in their place.
        source: The model's name in messages.

    Raises:
        ModelError: Several are active, it takes no part in the computation, or it is none that
            changes weights.
    """
    configurations: Mapping[str, Any] = getattr(module, "peft_config", None) or {}
    network = network_of(module)
    layers = dict(_tuner_layers(network))
    for configuration in configurations.values():
        if getattr(configuration, "is_prompt_learning", False):
            raise ModelError(_not_mergeable(source, configuration))
    if not layers:
        if configurations:
            raise ModelError(_not_mergeable(source, next(iter(configurations.values()))))
        return None
    off = next((path for path, layer in layers.items() if layer.disable_adapters), None)
    if off is not None:
        raise ModelError(
            f"{source}: the adapter of {off} is disabled, expected one that takes part in the computation; call the "
            f"model's `{_enabling(module)}()`, or pass the base model alone"
        )
    merged = next((path for path, layer in layers.items() if getattr(layer, "merged", False)), None)
    if merged is not None:
        raise ModelError(
            f"{source}: the adapter of {merged} is merged for the time being, expected one in its place; call "
            "`unmerge_adapter()`, or pass what `merge_and_unload()` returns"
        )
    active = list(dict.fromkeys(name for layer in layers.values() for name in layer.active_adapters))
    if len(active) != 1:
        raise ModelError(
            f"{source}: found {len(active)} active adapters ({', '.join(active) or 'none'}), expected one; choose it "
            "with `set_adapter`, or pass what `merge_and_unload()` returns"
        )
    return active[0], configurations[active[0]]


def merged_copy(module: nn.Module, name: str, configuration: Any, source: str) -> tuple[PreTrainedModel, Adapter]:
    """A copy of the network with its adapter merged into the weights; the original stays as it is.

    Raises:
        ModelError: The adapter cannot be merged.
    """
    return merged(copy.deepcopy(network_of(module)), name, configuration, source)


@torch.no_grad()
def merged(network: nn.Module, name: str, configuration: Any, source: str) -> tuple[PreTrainedModel, Adapter]:
    """The network with its adapter merged into the weights, in place.

    Args:
        network: A Transformers model with the adapter in its place.
        name: The adapter's name.
        configuration: Its configuration.
        source: The model's name in messages.

    Raises:
        ModelError: The adapter's method has no weights to merge, or the merged network computes
            something else.
    """
    result: Any = network
    network.eval()
    digest = weights_digest(network, name)
    tokens = torch.arange(_PROBED_TOKENS, device=next(network.parameters()).device)[None]
    expected = _logits(result, tokens)
    inside: tuple[str, ...] = ()
    for path, layer in list(network.named_modules()):
        if path.startswith(inside) or not _is_adapted(layer):
            continue
        inside = (*inside, f"{path}.")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of methods whose merging rounds
                plain = _unloaded(layer)
        except Exception as error:  # methods raise errors of many types
            reason = one_line(error, 300) or type(error).__name__
            raise ModelError(_not_mergeable(source, configuration, reason)) from None
        parent, _, child = path.rpartition(".")
        setattr(network.get_submodule(parent), child, plain)
    if hasattr(result, "peft_config"):
        del result.peft_config
    result._hf_peft_config_loaded = False
    found = _logits(result, tokens)
    tolerance = 1e-3 if found.dtype in (torch.float32, torch.float64) else 0.25
    difference = float((found - expected).abs().max())
    if not difference <= tolerance * float(expected.abs().max()) + 1e-6:
        reason = f"its logits then differ by {difference:.3g}"
        raise ModelError(_not_mergeable(source, configuration, reason))
    fields = adapter_fields(configuration)
    return result, Adapter(parameters="merged", name=name, configuration=fields, digest=digest)


def in_place(network: nn.Module, name: str, configuration: Any, source: str) -> Adapter:
    """The adapter of a network that keeps it in its place, for gradients of its matrices.

    Raises:
        ModelError: It trains something else than matrices of linear layers; the message names it.
    """
    places = _places(network)
    trained = tuple(
        path
        for path, parameter in network.named_parameters()
        if parameter.requires_grad or _own_name(path, places, name) not in (None, path)
    )
    _check_linear(network, name, trained, configuration, source)
    matrices = {}
    for path, child in network.named_modules():
        own = _own_name(path, places, name)
        if isinstance(child, nn.Linear) and own not in (None, path) and f"{path}.weight" in trained:
            matrices[path] = own
    if not matrices:
        raise ModelError(
            f"{source}: its {_method(configuration)} adapter trains no linear layer's matrix, expected LoRA's matrices "
            f'for `parameters="adapter"`; {_MERGED}'
        )
    fields = adapter_fields(configuration)
    return Adapter(parameters="adapter", name=name, configuration=fields, trained=trained, matrices=matrices)


def weights_digest(module: nn.Module, adapter: str | None = None) -> str:
    """BLAKE2b-128 of every parameter's and persistent buffer's name, shape, dtype and bytes.

    Args:
        module: The model.
        adapter: Name of its adapter, which is left out of names, like other adapters as a whole.
    """
    digest = running_digest()
    places = _places(module) if adapter is not None else set[str]()
    tensors = {_own_name(name, places, adapter or ""): tensor for name, tensor in module.state_dict().items()}
    for name, tensor in sorted((name, tensor) for name, tensor in tensors.items() if name is not None):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def adapter_fields(configuration: Any) -> dict[str, str]:
    """The fields of an adapter's configuration that decide its function, as JSON texts by name.

    Fields that are empty or off are left out, as another version of PEFT may know more of them.
    """
    fields = {key: _plain(value) for key, value in configuration.to_dict().items()}
    return {
        key: json.dumps(fields[key], sort_keys=True, default=str)
        for key in sorted(fields)
        if fields[key] and key not in _NOT_OF_THE_FUNCTION and not key.endswith(_OF_TRAINING)
    }


def unwrapped(module: nn.Module | None) -> nn.Module | None:
    """The copy of a module that an adapter trains instead (`modules_to_save`); else the module itself."""
    copies = getattr(module, "modules_to_save", None)
    active = getattr(module, "active_adapters", None)
    return copies[active[0]] if isinstance(copies, nn.ModuleDict) and active and active[0] in copies else module


# ---- Inside ----------------------------------------------------------------------------------------


def _tuner_layers(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """Path and module of every module that an adapter is in place of."""
    if "peft" in sys.modules:
        yield from ((path, child) for path, child in network.named_modules() if _is_adapted(child))


def _is_adapted(module: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))


def _places(network: nn.Module) -> set[str]:
    """Paths of the dictionaries, by adapter's name, that hold what adapters are made of."""
    return {
        f"{path}.{attribute}"
        for path, layer in _tuner_layers(network)
        for attribute, child in layer.named_children()
        if isinstance(child, (nn.ModuleDict, nn.ParameterDict)) or type(child).__name__ == "BufferDict"
    }


def _own_name(path: str, places: Collection[str], adapter: str) -> str | None:
    """A path without the adapter's name; the path itself outside adapters, None in another."""
    parts = path.split(".")
    for end in range(1, len(parts)):
        if ".".join(parts[:end]) in places:
            return ".".join((*parts[:end], *parts[end + 1 :])) if parts[end] == adapter else None
    return path


def _unloaded(layer: Any) -> nn.Module:
    """A plain module that computes what a module with an adapter does."""
    if hasattr(layer, "unload_and_optionally_merge_module"):
        return layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
    layer.merge(safe_merge=False, adapter_names=None)
    return layer.get_base_layer()


def _check_linear(network: nn.Module, name: str, trained: Collection[str], configuration: Any, source: str) -> None:
    """Raise unless all that an adapter trains in place of a linear layer are linear layers' weights."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    places = _places(network)
    for path, layer in _tuner_layers(network):
        if not isinstance(layer, BaseTunerLayer):
            continue
        base = layer.get_base_layer()
        if isinstance(base, nn.Embedding):  # left out, as embeddings always are
            continue
        for parameter in (one for one in trained if one.startswith(f"{path}.")):
            owner = network.get_submodule(parameter.rpartition(".")[0])
            outside = _own_name(parameter, places, name) in (None, parameter)
            if not isinstance(base, (nn.Linear, Conv1D)) or not (outside or isinstance(owner, nn.Linear)):
                raise ModelError(
                    f"{source}: its {_method(configuration)} adapter trains {parameter}, which is no matrix of a "
                    "linear "
                    f'layer beside another; expected LoRA\'s matrices for `parameters="adapter"`; {_MERGED}'
                )


def _logits(network: Any, tokens: Tensor) -> Tensor:
    return network(input_ids=tokens, use_cache=False).logits


def _method(configuration: Any) -> str:
    """Name of a PEFT method, such as LORA."""
    kind = getattr(configuration, "peft_type", None)
    return one_line(str(getattr(kind, "value", kind)), 40)


def _not_mergeable(source: str, configuration: Any, reason: str | None = None) -> str:
    because = "changes no weights" if reason is None else f"cannot be merged into the weights ({reason})"
    return (
        f"{source}: its {_method(configuration)} adapter {because}, so that gradients of weights do not show what it "
        "learned; expected one whose `merge_and_unload` gives a network of the same function, such as LoRA; tune with "
        "such an adapter, or pass the base model alone"
    )


def _plain(value: Any) -> Any:
    """A field's value for JSON: names of enumerations, sorted sets."""
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    return getattr(value, "value", value)
