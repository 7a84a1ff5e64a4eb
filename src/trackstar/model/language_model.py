"""Load a causal language model with its tokenizer, freeze it, and split it into backbone and head."""

import dataclasses
from collections.abc import Mapping, Sequence
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
from trackstar.model.configuration import deciding_fields
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
from trackstar.text import abridged, one_line

_PROBE_TOKENS = 5


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
        module: The Transformers model, in evaluation mode; no parameter requires gradients.
        tokenizer: Its tokenizer.
        blocks: Its layer blocks, attention before MLP.
        coverage: Share of its parameters in the layer blocks.
        head: Its output head.
        input_groups: For each matrix, the first matrix with the same input tensor (query-key-value,
            gate-up).
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

    def embeddings(self, token_ids: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens width"]:
        """Token embeddings, detached from the graph."""
        return self.module.get_input_embeddings()(token_ids).detach()

    def hidden_states(self, embeddings: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens width"]:
        """The head's input. Padding must be on the right, where causal attention hides it."""
        hidden = self.module.base_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        return hidden.to(self.device)

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
    """Freeze a Transformers model in memory and name its layer blocks; arguments as in `load_model`.

    Raises:
        ModelError: It holds values that are not finite, or does not compute its logits as `Head` does.
        UnsupportedModelError: Its matrices cannot be named.
        OptionError: A pattern or the number of layer blocks cannot be used.
    """
    if isinstance(layer_blocks, int):
        blocks = find_layer_blocks(
            module, blocks_per_kind=layer_blocks, attention_pattern=attention_pattern, mlp_pattern=mlp_pattern
        )
    else:
        blocks = named_layer_blocks(module, layer_blocks)
    for parameter_name, parameter in module.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ModelError(
                f"{source}: {parameter_name} holds NaN or infinite weights; expected finite ones; reload or retrain it"
            )
    module.eval().requires_grad_(False)
    head = _head(module, source)
    groups = _probe(module, head, [matrix for block in blocks for matrix in block.matrices], source)
    return LanguageModel(
        module=module,
        tokenizer=tokenizer,
        blocks=blocks,
        coverage=coverage(module, blocks),
        head=head,
        input_groups=groups,
        source=source,
        revision=revision,
        gguf_file=gguf_file,
        folder=folder,
    )


def largest_weight(module: nn.Module) -> str:
    """The largest weight in absolute value, with its parameter, for messages."""
    largest = {name: float(parameter.abs().max()) for name, parameter in module.named_parameters() if parameter.numel()}
    name = max(largest, key=lambda name: largest[name])
    return f"the largest weight is {largest[name]:.3g}, in {name}"


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
    return load_pretrained(
        "AutoModelForCausalLM",
        name,
        name=name,
        purpose="a causal language model",
        expected="a Hugging Face model folder or hub name with safetensors weights, or GGUF weights",
        whole="a complete causal language model (missing weights would be random)",
        dtype=dtype,
        **options,
    )


def _head(module: PreTrainedModel, source: str) -> Head:
    output = module.get_output_embeddings()
    if not isinstance(output, nn.Linear):
        raise ModelError(f"{source}: found {type(output).__name__} as output head; expected one linear layer")
    config = module.config.get_text_config()
    multiplier = getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)
    return Head(
        weight=output.weight,
        bias=output.bias,
        scale=(multiplier or 1.0) / (divisor or 1.0),
        cap=getattr(config, "final_logit_softcapping", None),
    )


def _probe(module: PreTrainedModel, head: Head, matrices: list[WeightMatrix], source: str) -> dict[str, str]:
    """Run a few tokens: check that backbone and head give the model's logits, and group matrices by input.

    Returns:
        `LanguageModel.input_groups`.
    """
    inputs: dict[str, Tensor] = {}
    handles = [
        module.get_submodule(matrix.name).register_forward_hook(
            lambda _module, arguments, _output, name=matrix.name: inputs.__setitem__(name, arguments[0])
        )
        for matrix in matrices
    ]
    token_ids = (torch.arange(_PROBE_TOKENS, device=head.weight.device) % head.weight.shape[0]).unsqueeze(0)
    try:
        with torch.no_grad():
            expected = module(input_ids=token_ids, use_cache=False).logits.float()
            inputs.clear()
            embeddings = module.get_input_embeddings()(token_ids)
            hidden = module.base_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
            found = head.logits(hidden[0].to(head.weight.device)).float()[None].to(expected.device)
    except Exception as error:
        reason = one_line(error, 300) or type(error).__name__
        raise ModelError(f"{source}: {type(module).__name__} cannot be run from embeddings ({reason})") from None
    finally:
        for handle in handles:
            handle.remove()
    if not torch.isfinite(expected).all():
        raise ModelError(
            f"{source}: the logits of a few tokens are NaN or infinite, expected finite ones; "
            f"{largest_weight(module)}: its weights are damaged, or too large for the computation's dtype"
        )
    tolerance = 1e-3 if head.weight.dtype == torch.float32 else 5e-2
    if not torch.allclose(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())):
        raise ModelError(
            f"{source}: {type(module).__name__} computes logits in a way that trackstar does not support (they differ "
            f"by {float((found - expected).abs().max()):.3g} from those of a linear head); please report this "
            "architecture"
        )
    unused = [matrix for matrix in matrices if matrix.name not in inputs]
    if unused:
        raise ModelError(
            f"{source}: {unused[0].name} takes no part in the forward pass; exclude it with `{unused[0].kind}_pattern`"
        )
    leaders: dict[int, str] = {}
    return {name: leaders.setdefault(id(tensor), name) for name, tensor in inputs.items()}
