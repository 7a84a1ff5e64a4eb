"""Load a causal language model with its tokenizer, freeze it, and split it into backbone and head."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trackstar.choices import DTYPES
from trackstar.corpus.digests import digest_of_bytes, running_digest
from trackstar.corpus.local_files import check_not_special
from trackstar.errors import ModelError, OptionError, check_choice
from trackstar.model.computation import check_computed, frozen, input_groups, module_paths
from trackstar.model.configuration import deciding_fields
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
from trackstar.model.loading import checked_device, load_pretrained, load_pretrained_tokenizer, spread_over_gpus
from trackstar.model.probe import hidden_states, probe
from trackstar.model.quantization import (
    ADVICE,
    check_floating_point,
    dequantized,
    dequantizing_options,
    quantization_method,
)
from trackstar.text import abridged

# Fields of a configuration for the bound on logits (Gemma 2; RecurrentGemma; xLSTM).
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# Linear layers that may return more than their product: which expert a token goes to.
_ROUTER = re.compile(r".*\.(?:router|gate)")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """Map from the last hidden states h to logits.

    z = cap·tanh(scale·(h Wᵀ + b)/cap), or z = scale·(h Wᵀ + b) without a cap.

    Attributes:
        weight: W, one row per token of the vocabulary.
        bias: b, or None.
        scale: Factor on the logits: Cohere's multiplier, the inverse of Granite's divisor, else 1.
        cap: Gemma 2's soft cap, or None.
    """

    weight: Float[Tensor, "vocabulary width"]
    bias: Float[Tensor, "vocabulary"] | None
    scale: float
    cap: float | None

    def logits(self, hidden: Float[Tensor, "positions width"]) -> Float[Tensor, "positions vocabulary"]:
        """Logits of each position, in the dtype of the hidden states."""
        logits = nn.functional.linear(hidden, self.weight, self.bias)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


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
            a layer's inputs cannot be told apart by example.
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

    @property
    def matrices(self) -> tuple[WeightMatrix, ...]:
        """The matrices of all layer blocks, block by block."""
        return tuple(matrix for block in self.blocks for matrix in block.matrices)

    @property
    def matrix_shapes(self) -> list[tuple[str, int, int]]:
        """Name, rows and columns of each matrix, in the order of `matrices`."""
        return [(matrix.name, matrix.rows, matrix.columns) for matrix in self.matrices]

    @property
    def vocabulary(self) -> int:
        """Number of tokens that have both an embedding and a logit; ids are below it."""
        return min(len(self.module.get_input_embeddings().get_parameter("weight")), len(self.head.weight))

    @property
    def device(self) -> torch.device:
        """Device of the head."""
        return self.head.weight.device

    def device_of(self, matrix: WeightMatrix) -> torch.device:
        """Device of a matrix, which differs from the head's if the model is spread over several GPUs."""
        return self.module.get_parameter(matrix.parameter).device

    def check_on_one_device(self, computation: str) -> None:
        """Raise if the model is spread over several devices, for a computation that needs it on one.

        Raises:
            OptionError: It is; the message begins with the computation.
        """
        devices = len({parameter.device for parameter in self.module.parameters()})
        if devices > 1:
            raise OptionError(
                f"{computation}: needs a model on one device, found one spread over {devices} "
                '(`device="auto"`); load it with `device="cuda"` if one GPU holds it, or with `device="cpu"`'
            )

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
        return self.module.get_input_embeddings()(token_ids).detach()

    def states_from_embeddings(
        self, embeddings: Float[Tensor, "batch tokens width"]
    ) -> Float[Tensor, "batch tokens width"]:
        """The last hidden state of `base_model`, from token embeddings."""
        return self.module.base_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state.to(self.device)

    def batch_budget(self, batch_tokens: int) -> int:
        """Most tokens per batch, of which a model that takes one example at a time needs one."""
        return 1 if self.one_at_a_time else batch_tokens

    def digest(self) -> str:
        """BLAKE2b-128 of every parameter's and persistent buffer's name, shape, dtype and bytes."""
        digest = running_digest()
        for name, tensor in sorted(self.module.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def configuration(self) -> dict[str, str]:
        """The fields of the configuration that decide the model's function, as JSON texts by name."""
        return deciding_fields(self.module.config)

    def tokenizer_digest(self) -> str:
        """BLAKE2b-128 of the tokenizer's definition."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        definition = backend.to_str() if backend is not None else repr(sorted(self.tokenizer.get_vocab().items()))
        return digest_of_bytes(definition.encode())


def load_model(
    source: str | Path,
    *,
    revision: str | None = None,
    gguf_file: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    attention_pattern: str | None = None,
    mlp_pattern: str | None = None,
    layer_blocks: int | Sequence[NamedBlock] = 8,
) -> LanguageModel:
    """Load a causal language model and its tokenizer from a folder, a hub name or GGUF weights.

    Weights are read from safetensors or GGUF only, and code that comes with a model is never run.

    Args:
        source: A folder, a `.gguf` file, or a hub name.
        revision: The hub's revision.
        gguf_file: File of GGUF weights in the folder or hub repository. A folder with one such file
            and no `config.json` needs no name.
        dtype: Dtype of weights and computation: `float32` or `bfloat16`.
        device: A torch device, such as `cpu` or `cuda`, or `auto`, which spreads the layers over all
            GPUs with Accelerate.
        attention_pattern: See `find_layer_blocks`.
        mlp_pattern: See `find_layer_blocks`.
        layer_blocks: Number of blocks for each of attention and MLP, or the named blocks of an index.

    Raises:
        ModelError: It cannot be loaded, holds values that are not finite, or does not compute its
            logits as `Head` does.
        UnsupportedModelError: Its matrices cannot be named.
        OptionError: The dtype or device is unknown, or a pattern cannot be used.
    """
    if not isinstance(source, (str, Path)):
        raise OptionError(f"`model`: expected a path or a hub name, found {abridged(source)}")
    check_choice("dtype", dtype, DTYPES)
    target = None if device == "auto" else checked_device(device)
    folder, gguf_file = _resolved(source, gguf_file)
    name = str(folder or source)
    options = {option: value for option, value in (("revision", revision), ("gguf_file", gguf_file)) if value}
    module = _loaded(name, options=options, dtype=getattr(torch, dtype))
    if target is None:
        spread_over_gpus(module, name)
    else:
        nn.Module.to(module, target)
    module.eval().requires_grad_(False)
    tokenizer = load_pretrained_tokenizer(name, name=name, **options)
    return wrap_model(
        module,
        tokenizer,
        source=str(source),
        revision=revision,
        gguf_file=gguf_file,
        folder=folder,
        attention_pattern=attention_pattern,
        mlp_pattern=mlp_pattern,
        layer_blocks=layer_blocks,
    )


def wrap_model(
    module: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    source: str = "in memory",
    revision: str | None = None,
    gguf_file: str | None = None,
    folder: Path | None = None,
    attention_pattern: str | None = None,
    mlp_pattern: str | None = None,
    layer_blocks: int | Sequence[NamedBlock] = 8,
) -> LanguageModel:
    """Name the layer blocks of a Transformers model in memory; arguments as in `load_model`.

    The model keeps its training mode and its parameters' `requires_grad`, which computations change only
    while they run.

    Raises:
        ModelError: It holds values that are not finite, or does not compute its logits as `Head` does.
        UnsupportedModelError: Its matrices cannot be named.
        OptionError: A pattern or the number of layer blocks cannot be used.
    """
    check_floating_point(module, source)
    for parameter_name, parameter in module.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ModelError(
                f"{source}: {parameter_name} holds NaN or infinite weights; expected finite ones; reload or retrain it"
            )
    heads = _heads(module, source)
    with frozen(module):
        found = probe(module, [head.logits for head in heads], _vocabulary(module, heads[0]), source)
    if isinstance(layer_blocks, int):
        blocks = find_layer_blocks(
            module,
            blocks_per_kind=layer_blocks,
            attention_pattern=attention_pattern,
            mlp_pattern=mlp_pattern,
            used=[path for path in found.calls if path not in found.faults or not _ROUTER.fullmatch(path)],
        )
    else:
        blocks = named_layer_blocks(module, layer_blocks)
    matrices = [matrix for block in blocks for matrix in block.matrices]
    for matrix in matrices:
        check_computed(module, matrix, found, source)
    layouts = {path: found.layouts[path] for m in matrices for path in module_paths(m) if path in found.layouts}
    repeated = frozenset(m.name for m in matrices if sum(found.calls.get(path, 0) for path in module_paths(m)) > 1)
    return LanguageModel(
        module=module,
        tokenizer=tokenizer,
        blocks=blocks,
        coverage=coverage(module, blocks),
        head=heads[found.head],
        input_groups=input_groups(matrices, found.groups, repeated),
        source=source,
        revision=revision,
        gguf_file=gguf_file,
        folder=folder,
        layouts=layouts,
        repeated=repeated,
        from_base=found.from_base,
        one_at_a_time=found.mixes or FLAT in layouts.values(),
    )


def _vocabulary(module: PreTrainedModel, head: Head) -> int:
    return min(len(module.get_input_embeddings().get_parameter("weight")), len(head.weight))


def context_tokens(module: PreTrainedModel) -> int:
    """Most tokens that the model reads at once; 2,048 if its configuration does not state it."""
    config = module.config.get_text_config()
    for field in ("max_position_embeddings", "n_positions", "max_sequence_length"):
        length = getattr(config, field, None)
        if isinstance(length, int) and length > 0:
            return length
    return 2048


def _resolved(source: str | Path, gguf_file: str | None) -> tuple[Path | None, str | None]:
    """The local folder, or None for a hub name, and the name of the GGUF file, or None for safetensors."""
    path = Path(source)
    check_not_special(path, ModelError)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{source}: is a file; expected a model folder, a .gguf file or a hub name")
        return path.parent, path.name
    if not path.is_dir():
        if not _may_be_on_hub(str(source)):
            raise ModelError(f"{source}: no such folder; expected a model folder, a .gguf file or a hub name")
        return None, gguf_file
    if gguf_file is not None and not (path / gguf_file).is_file():
        raise ModelError(f"{path / gguf_file}: no such file; expected GGUF weights; correct `gguf_file`")
    if gguf_file is None and not (path / "config.json").exists():
        weights = sorted(file.name for file in path.glob("*.gguf"))
        checkpoints = sorted(folder.name for folder in path.glob("checkpoint-*") if (folder / "config.json").exists())
        if checkpoints:
            raise ModelError(
                f"{source}: is a training run's folder; expected one of its models, such as {path / checkpoints[-1]}"
            )
        if len(weights) != 1:
            raise ModelError(
                f"{source}: found no config.json and {len(weights)} .gguf files; expected a Transformers model folder, "
                "or one .gguf file; name one of several with `gguf_file`"
            )
        gguf_file = weights[0]
    return path, gguf_file


def _may_be_on_hub(source: str) -> bool:
    """Whether a name that is no folder may be on the hub: `NAME` or `OWNER/NAME`, and no missing folder."""
    owner, slash, name = source.partition("/")
    if source.startswith((".", "~", "/")) or "\\" in source or "/" in name or (slash and not name):
        return False
    return not (slash and Path(owner).is_dir())


def _loaded(name: str, *, options: dict[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    method = quantization_method(name, **options)
    expected = "a Hugging Face model folder or hub name with safetensors weights, or GGUF weights"
    if method is not None:
        expected = f"weights that are not quantised, which these are ({method}); {ADVICE}"
    module = load_pretrained(
        "AutoModelForCausalLM",
        name,
        name=name,
        purpose="a causal language model",
        expected=expected,
        whole="a complete causal language model (missing weights would be random)",
        dtype=dtype,
        **options,
        **dequantizing_options(name, **options),
    )
    return dequantized(module, name, dtype)


def _heads(module: PreTrainedModel, source: str) -> list[Head]:
    """What the head may be: with the configuration's factor, or without it where that precedes the head."""
    output = module.get_output_embeddings()
    if not isinstance(output, nn.Linear):
        raise ModelError(f"{source}: found {type(output).__name__} as output head; expected one linear layer")
    config = module.config.get_text_config()
    multiplier = getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)
    cap = next((cap for name in _CAPS if (cap := getattr(config, name, None))), None)
    scales = dict.fromkeys(((multiplier or 1.0) / (divisor or 1.0), 1.0))
    return [Head(weight=output.weight, bias=output.bias, scale=scale, cap=cap) for scale in scales]
