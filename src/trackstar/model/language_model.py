"""Load a causal language model with its tokenizer, freeze it, and split it into backbone and head."""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trackstar.choices import DTYPES, PARAMETERS, DeviceMap, Parameters
from trackstar.corpus.digests import digest_of_bytes
from trackstar.errors import ModelError, OptionError, check_choice
from trackstar.model.adapter import (
    Adapter,
    find_adapter,
    in_place,
    merged,
    merged_copy,
    network_of,
    weights_digest,
)
from trackstar.model.adapter_files import adapter_folder_of_hub, is_adapter_folder, load_adapter
from trackstar.model.computation import check_computed, frozen, input_groups, module_paths
from trackstar.model.configuration import deciding_fields
from trackstar.model.devices import checked_device_map, resolved_device
from trackstar.model.head import Head, embedding_weight, possible_heads
from trackstar.model.input_layouts import FLAT, InputLayout
from trackstar.model.layer_blocks import (
    Coverage,
    LayerBlock,
    NamedBlock,
    WeightMatrix,
    coverage,
    find_layer_blocks,
    named_layer_blocks,
)
from trackstar.model.loading import load_pretrained_tokenizer, may_be_on_hub
from trackstar.model.placement import place
from trackstar.model.probe import hidden_states, probe
from trackstar.model.quantization import check_floating_point
from trackstar.model.sources import load_whole, resolved
from trackstar.text import abridged

# Linear layers that may return more than their product: which expert a token goes to.
_ROUTER = re.compile(r".*\.(?:router|gate)")


# Bytes of a batch's activations, the inputs and outputs of all matrices, that a pass on the CPU may take.
_ACTIVATIONS = 768 << 20


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LanguageModel:
    """A frozen causal language model, its tokenizer and its layer blocks.

    Attributes:
        module: The Transformers model. Computations run within `frozen`, which leaves its training mode
            and its parameters' `requires_grad` as they were.
        tokenizer: Its tokenizer.
        blocks: Its layer blocks, attention before MLP.
        coverage: Share of its parameters in the layer blocks.
        head: Its output head.
        input_groups: For each matrix, the first matrix with the same input tensor (query-key-value,
            gate-up).
        layouts: Layout of the input of each module that does not read [batch, tokens, columns].
        repeated: Names of the matrices that several calls in a forward pass compute with.
        from_base: Whether the head's input is the last hidden state of the module's `base_model`.
        one_at_a_time: Whether a batch must be one example: the model mixes the examples of a batch, or
            a layer's inputs cannot be assigned to examples.
        adapter: Its PEFT adapter, and whose gradients are taken; None if it has none.
        source: The path or hub name it was loaded from.
        revision: The hub's revision, or None.
        gguf_file: The file of GGUF weights that it was loaded from, or None.
        folder: The local folder that it was loaded from, or None.
    """

    module: PreTrainedModel
    tokenizer: Any
    blocks: tuple[LayerBlock, ...]
    coverage: Coverage
    head: Head
    input_groups: Mapping[str, str]
    source: str
    revision: str | None = None
    gguf_file: str | None = None
    folder: Path | None = None
    layouts: Mapping[str, InputLayout] = dataclasses.field(default_factory=dict)
    repeated: frozenset[str] = frozenset()
    from_base: bool = True
    one_at_a_time: bool = False
    adapter: Adapter | None = None

    @property
    def parameters(self) -> Parameters | None:
        """Whether gradients are the merged network's or the adapter's; None for a model without adapter."""
        return None if self.adapter is None else self.adapter.parameters

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that the model's optimizer moves, by name: all, or those of its adapter."""
        parameters = dict(self.module.named_parameters())
        if self.adapter is None or self.adapter.parameters == "merged":
            return parameters
        return {name: parameters[name] for name in self.adapter.trained}

    @property
    def matrices(self) -> tuple[WeightMatrix, ...]:
        """The matrices of all layer blocks, block by block."""
        return tuple(matrix for block in self.blocks for matrix in block.matrices)

    @property
    def matrix_shapes(self) -> list[tuple[str, int, int]]:
        """Name, rows and columns of each matrix, in the order of `matrices`."""
        return [(matrix.name, matrix.rows, matrix.columns) for matrix in self.matrices]

    @property
    def described_coverage(self) -> str:
        """The share of the parameters in the layer blocks, for a note."""
        if self.adapter is None or self.adapter.parameters == "merged":
            return f"{self.coverage}{'' if self.adapter is None else '; its adapter is merged'}"
        return f"of its adapter {self.coverage}"

    @property
    def vocabulary(self) -> int:
        """Number of tokens that have both an embedding and a logit; ids are below it."""
        return min(len(embedding_weight(self.module)), len(self.head.weight))

    @property
    def device(self) -> torch.device:
        """Device of the head, on which batches, φ and losses are."""
        return self.head.weight.device

    def device_of(self, matrix: WeightMatrix) -> torch.device:
        """Device of a matrix, which differs from the head's if the model is spread over several GPUs."""
        return self.module.get_parameter(matrix.parameter).device

    @property
    def device_names(self) -> str:
        """All devices that hold its parameters, for a record: `cuda:0`, or `cuda:0, cuda:1`."""
        return ", ".join(sorted({str(parameter.device) for parameter in self.module.parameters()}))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights and of the computation."""
        return self.head.weight.dtype

    @property
    def dtype_name(self) -> str:
        """Name of `dtype`, such as `float32`."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def architecture(self) -> str:
        """Name of the model's class."""
        return type(self.module).__name__

    @property
    def context_tokens(self) -> int:
        """Most tokens that the model reads at once."""
        return context_tokens(self.module)

    def frozen(self) -> AbstractContextManager[None]:
        """Context in which the model is in evaluation mode, and no parameter requires gradients."""
        return frozen(self.module)

    def hidden_states(self, token_ids: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens width"]:
        """The head's input. Padding must be on the right, where causal attention hides it."""
        return hidden_states(self.module, token_ids, from_base=self.from_base).to(self.device)

    def embeddings(self, token_ids: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens width"]:
        """Token embeddings, detached from the graph."""
        embedding = self.module.get_input_embeddings()
        return embedding(token_ids.to(embedding.get_parameter("weight").device)).detach()

    def states_from_embeddings(
        self, embeddings: Float[Tensor, "batch tokens width"]
    ) -> Float[Tensor, "batch tokens width"]:
        """The last hidden state of `base_model`, from token embeddings."""
        return self.module.base_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state.to(self.device)

    def batch_budget(self, batch_tokens: int) -> int:
        """Most tokens per batch, at most so many.

        A model that takes one example at a time needs one. On the CPU, which gains nothing from larger
        batches, the activations of a pass take at most 768 MiB, or a quarter of the weights if that is more.
        """
        if self.one_at_a_time:
            return 1
        if self.device.type != "cpu" or any(matrix.expert is not None for matrix in self.matrices):
            return batch_tokens
        weights = sum(parameter.nbytes for parameter in self.module.parameters())
        of_a_token = self.dtype.itemsize * sum(matrix.rows + matrix.columns for matrix in self.matrices)
        return min(batch_tokens, max(1, max(_ACTIVATIONS, weights // 4) // max(1, of_a_token)))

    def digest(self) -> str:
        """Digest of the weights and of the adapter's, before they were merged; see `weights_digest`."""
        if self.adapter is None:
            return weights_digest(self.module)
        return self.adapter.digest or weights_digest(self.module, self.adapter.name)

    def configuration(self) -> dict[str, str]:
        """The fields of the configuration that decide the model's function, as JSON texts by name."""
        return deciding_fields(self.module.config)

    def tokenizer_digest(self) -> str:
        """BLAKE2b-128 of the tokenizer's definition."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        definition = backend.to_str() if backend is not None else repr(sorted(self.tokenizer.get_vocab().items()))
        return digest_of_bytes(definition.encode())


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Naming:
    """How layer blocks are named; see `find_layer_blocks`."""

    attention_pattern: str | None
    mlp_pattern: str | None
    layer_blocks: int | Sequence[NamedBlock]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Origin:
    """Where a model comes from; attributes as in `LanguageModel`."""

    source: str
    revision: str | None
    gguf_file: str | None
    folder: Path | None


def load_model(
    source: str | Path,
    *,
    revision: str | None = None,
    gguf_file: str | None = None,
    parameters: Parameters = "merged",
    dtype: str = "float32",
    device: str = "auto",
    device_map: DeviceMap | Mapping[str, str] | None = None,
    attention_pattern: str | None = None,
    mlp_pattern: str | None = None,
    layer_blocks: int | Sequence[NamedBlock] = 8,
) -> LanguageModel:
    """Load a causal language model and its tokenizer: a folder, a hub name, GGUF weights or a PEFT adapter.

    Weights are read from safetensors or GGUF only, and code that comes with a model is never run. An
    adapter is loaded with the base model that its `adapter_config.json` names: a path seen from the
    adapter's folder or from the working directory, or a hub name.

    Args:
        source: A folder, a `.gguf` file, or a hub name.
        revision: The hub's revision.
        gguf_file: File of GGUF weights in the folder or hub repository. A folder with one such file
            and no `config.json` needs no name.
        parameters: Whose gradients are taken if the source is an adapter: `merged` is those of the
            merged network's matrices, `adapter` those of the adapter's own matrices.
        dtype: Dtype of weights and computation: `float32` or `bfloat16`.
        device: A torch device, such as `cpu`, `cuda:1` or `mps`; `auto` is the best one that works:
            cuda, then mps, then cpu.
        device_map: Spreads one model over all GPUs with Accelerate: `auto` evenly, `sequential` one GPU
            after the other; or a device for each module, by name. None leaves it on `device`.
        attention_pattern: See `find_layer_blocks`.
        mlp_pattern: See `find_layer_blocks`.
        layer_blocks: Number of blocks for each of attention and MLP, or the named blocks of an index.

    Raises:
        ModelError: It cannot be loaded, holds values that are not finite, or does not compute its
            logits as `Head` does; or its adapter has no gradients of these parameters.
        UnsupportedModelError: Its matrices cannot be named.
        OptionError: The dtype, device or device map is unknown, or a pattern cannot be used.
    """
    if not isinstance(source, (str, Path)):
        raise OptionError(f"`model`: expected a path or a hub name, found {abridged(source)}")
    check_choice("dtype", dtype, DTYPES)
    check_choice("parameters", parameters, PARAMETERS)
    spread = checked_device_map(device_map, device)
    target = resolved_device(device) if spread is None else spread
    folder, gguf_file = resolved(source, gguf_file)
    name = str(folder or source)
    options = {option: value for option, value in (("revision", revision), ("gguf_file", gguf_file)) if value}
    adapted = _adapter_folder(folder, name, revision) if gguf_file is None else None
    adapter = None
    if adapted is None:
        module = load_whole(name, dtype=getattr(torch, dtype), **options)
        tokenizer = load_pretrained_tokenizer(name, name=name, **options)
        _check_no_adapter_asked(parameters, name)
    else:
        module, of_tokenizer = load_adapter(adapted, name, functools.partial(load_whole, dtype=getattr(torch, dtype)))
        tokenizer = load_pretrained_tokenizer(of_tokenizer, name=str(of_tokenizer))
        module, adapter = _with_parameters(module, parameters, name, live=False)
        nn.Module.to(module, getattr(torch, dtype))
        if folder is None:
            revision = adapted.name  # the hub's cache names a copy by its commit
    place(module, target, name)
    module.eval().requires_grad_(False)
    naming = _Naming(attention_pattern=attention_pattern, mlp_pattern=mlp_pattern, layer_blocks=layer_blocks)
    origin = _Origin(source=str(source), revision=revision, gguf_file=gguf_file, folder=folder)
    return _wrapped(module, tokenizer, adapter, naming, origin)


def wrap_model(
    module: PreTrainedModel | nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    source: str = "in memory",
    revision: str | None = None,
    gguf_file: str | None = None,
    folder: Path | None = None,
    parameters: Parameters = "merged",
    attention_pattern: str | None = None,
    mlp_pattern: str | None = None,
    layer_blocks: int | Sequence[NamedBlock] = 8,
) -> LanguageModel:
    """Name the layer blocks of a Transformers model or `PeftModel`; arguments as in `load_model`.

    The model keeps its training mode and its parameters' `requires_grad`, which computations change only
    while they run. A model with an adapter is copied to be merged, and stays as it is.

    Raises:
        ModelError: It holds values that are not finite, or does not compute its logits as `Head` does;
            or its adapter has no gradients of these parameters.
        UnsupportedModelError: Its matrices cannot be named.
        OptionError: A pattern or the number of layer blocks cannot be used, or it is called in
            `torch.inference_mode`.
    """
    check_choice("parameters", parameters, PARAMETERS)
    if torch.is_inference_mode_enabled():
        raise OptionError(
            f"{source}: found `torch.inference_mode()`, in which there are no gradients; leave it, or use "
            "`torch.no_grad()`"
        )
    module = getattr(module, "_orig_mod", module)  # what `torch.compile` wraps
    network, adapter = _with_parameters(module, parameters, source, live=True)
    naming = _Naming(attention_pattern=attention_pattern, mlp_pattern=mlp_pattern, layer_blocks=layer_blocks)
    origin = _Origin(source=source, revision=revision, gguf_file=gguf_file, folder=folder)
    return _wrapped(network, tokenizer, adapter, naming, origin)


def _adapter_folder(folder: Path | None, name: str, revision: str | None) -> Path | None:
    """The local folder of an adapter; None if the source is a whole model."""
    if folder is not None:
        return folder if is_adapter_folder(folder) else None
    return adapter_folder_of_hub(name, revision) if may_be_on_hub(name) else None


def _with_parameters(
    module: nn.Module, parameters: Parameters, source: str, *, live: bool
) -> tuple[Any, Adapter | None]:
    """The network whose gradients are asked for, and its adapter."""
    found = find_adapter(module, source)
    if found is None:
        _check_no_adapter_asked(parameters, source)
        return module, None
    network: Any = network_of(module)
    check_floating_point(network, source)
    if parameters == "merged":
        return (merged_copy if live else merged)(module, *found, source)
    return network, in_place(network, *found, source)


def _check_no_adapter_asked(parameters: Parameters, source: str) -> None:
    if parameters == "adapter":
        raise OptionError(
            f"`parameters`: adapter needs a model with a PEFT adapter, found {source} without one; pass the adapter's "
            "folder as `model`, or leave `parameters` out"
        )


def _wrapped(
    module: PreTrainedModel,
    tokenizer: Any,
    adapter: Adapter | None,
    naming: _Naming,
    origin: _Origin,
) -> LanguageModel:
    """The model with its layer blocks; see `wrap_model`."""
    source, layer_blocks = origin.source, naming.layer_blocks
    check_floating_point(module, source)
    for parameter_name, parameter in module.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ModelError(
                f"{source}: {parameter_name} holds NaN or infinite weights; expected finite ones; reload or retrain it"
            )
    heads = possible_heads(module, source)
    with frozen(module):
        found = probe(module, [head.logits for head in heads], _vocabulary(module, heads[0]), source)
    if isinstance(layer_blocks, int):
        blocks = find_layer_blocks(
            module,
            blocks_per_kind=layer_blocks,
            attention_pattern=naming.attention_pattern,
            mlp_pattern=naming.mlp_pattern,
            used=[path for path in found.calls if path not in found.faults or not _ROUTER.fullmatch(path)],
            adapter=adapter,
        )
    else:
        blocks = named_layer_blocks(module, layer_blocks, adapter)
    matrices = [matrix for block in blocks for matrix in block.matrices]
    for matrix in matrices:
        check_computed(module, matrix, found, source)
    layouts = {path: found.layouts[path] for m in matrices for path in module_paths(m) if path in found.layouts}
    repeated = frozenset(m.name for m in matrices if sum(found.calls.get(path, 0) for path in module_paths(m)) > 1)
    return LanguageModel(
        module=module,
        tokenizer=tokenizer,
        blocks=blocks,
        coverage=coverage(module, blocks, adapter),
        head=heads[found.head],
        input_groups=input_groups(matrices, found.groups, repeated),
        source=source,
        revision=origin.revision,
        gguf_file=origin.gguf_file,
        folder=origin.folder,
        layouts=layouts,
        repeated=repeated,
        from_base=found.from_base,
        one_at_a_time=found.mixes or FLAT in layouts.values(),
        adapter=adapter,
    )


def _vocabulary(module: PreTrainedModel, head: Head) -> int:
    return min(len(embedding_weight(module)), len(head.weight))


def context_tokens(module: PreTrainedModel) -> int:
    """Most tokens that the model reads at once; 2,048 if its configuration does not state it."""
    config = module.config.get_text_config()
    for field in ("max_position_embeddings", "n_positions", "max_sequence_length"):
        length = getattr(config, field, None)
        if isinstance(length, int) and length > 0:
            return length
    return 2048
