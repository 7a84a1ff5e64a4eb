"""Load a causal language model with its tokenizer, frozen, and split it where gradients need it: backbone and head."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trackstar.errors import ModelError, OptionError
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

DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_PROBE_TOKENS = 5


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """From the last hidden states to logits: z = cap·tanh(scale·(h Wᵀ + b)/cap), without a cap z = scale·(h Wᵀ + b).

    Attributes:
        weight: W, one row a token of the vocabulary.
        bias: b, or None.
        scale: Factor on the logits (Cohere multiplies, Granite divides), 1 elsewhere.
        cap: Gemma 2's soft cap, or None.
    """

    weight: Float[Tensor, "vocabulary width"]
    bias: Float[Tensor, "vocabulary"] | None
    scale: float
    cap: float | None

    def logits(self, hidden: Float[Tensor, "positions width"]) -> Float[Tensor, "positions vocabulary"]:
        """Logits of each position, in the hidden states' dtype."""
        logits = nn.functional.linear(hidden, self.weight, self.bias)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LanguageModel:
    """A frozen causal language model, its tokenizer and its layer blocks.

    Attributes:
        module: The Transformers model, in evaluation mode, no parameter requiring gradients.
        tokenizer: Its tokenizer.
        blocks: Its layer blocks, attention's first.
        coverage: What share of its parameters they cover.
        head: Its output head.
        input_groups: For each matrix, the first matrix that reads the very same input (query-key-value, gate-up).
        source: Where it was loaded from.
        revision: The hub's revision asked for.
        gguf_file: The file of GGUF weights, where it was loaded from one.
        folder: The local folder it was loaded from, or None.
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
        """Every matrix whose gradient counts, block by block."""
        return tuple(matrix for block in self.blocks for matrix in block.matrices)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head.weight.device

    def device_of(self, matrix: WeightMatrix) -> torch.device:
        """Where a matrix is; not where the head is, for a model that is spread over several GPUs."""
        return self.module.get_parameter(matrix.parameter).device

    def check_on_one_device(self, what: str) -> None:
        """See that a model is not spread over several GPUs where something cannot do with such a one.

        Raises:
            OptionError: It is.
        """
        devices = len({parameter.device for parameter in self.module.parameters()})
        if devices > 1:
            raise OptionError(
                f"{what}: needs a model on one device, found one spread over {devices} (--device auto); give --device "
                "one GPU that holds it, or cpu"
            )

    @property
    def dtype(self) -> torch.dtype:
        """The weights' and the computation's dtype."""
        return self.head.weight.dtype

    @property
    def architecture(self) -> str:
        """The model's class."""
        return type(self.module).__name__

    @property
    def context_tokens(self) -> int:
        """The most tokens that the model reads at once."""
        return context_tokens(self.module)

    def embeddings(self, token_ids: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens width"]:
        """Token embeddings, cut off from the graph."""
        return self.module.get_input_embeddings()(token_ids).detach()

    def hidden_states(self, embeddings: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens width"]:
        """What the head reads. Padding must be on the right: causal attention then never sees it."""
        hidden = self.module.base_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        return hidden.to(self.device)

    def digest(self) -> str:
        """BLAKE2b-128 of every parameter's and persistent buffer's name, shape, dtype and bytes."""
        digest = hashlib.blake2b(digest_size=16)
        for name, tensor in sorted(self.module.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def tokenizer_digest(self) -> str:
        """BLAKE2b-128 of the tokenizer's whole definition."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        definition = backend.to_str() if backend is not None else repr(sorted(self.tokenizer.get_vocab().items()))
        return hashlib.blake2b(definition.encode(), digest_size=16).hexdigest()


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

    Weights are read from safetensors or GGUF alone; code that comes with a model is never run.

    Args:
        source: A folder, a `.gguf` file, or a hub name.
        revision: The hub's revision.
        gguf_file: Which file of the folder or hub repository holds GGUF weights; found by itself in a folder that
            holds one and no `config.json`.
        dtype: Of weights and computation: `float32` or `bfloat16`.
        device: A torch device, such as `cpu` or `cuda`, or `auto`: layers spread over all GPUs by Accelerate.
        attention_pattern: See `find_layer_blocks`.
        mlp_pattern: See `find_layer_blocks`.
        layer_blocks: Blocks for each of attention and MLP, or the very blocks of an index.

    Raises:
        ModelError: It cannot be loaded, holds values that are not finite, or computes its logits in a way that
            trackstar does not know.
        UnsupportedModelError: Its matrices cannot be named.
        OptionError: The dtype or device is unknown.
    """
    if dtype not in DTYPES:
        raise OptionError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}")
    target = None if device == "auto" else checked_device(device)
    folder, gguf_file = _resolved(source, gguf_file)
    name = str(folder or source)
    options = {option: value for option, value in (("revision", revision), ("gguf_file", gguf_file)) if value}
    module = _loaded(name, options=options, dtype=DTYPES[dtype])
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
    """Freeze a Transformers model that is already in memory and name its layer blocks; errors as `load_model`."""
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


def context_tokens(module: PreTrainedModel) -> int:
    """The most tokens that the model reads at once; 2,048 where its configuration does not say."""
    config = module.config.get_text_config()
    for field in ("max_position_embeddings", "n_positions", "max_sequence_length"):
        length = getattr(config, field, None)
        if isinstance(length, int) and length > 0:
            return length
    return 2048


def _resolved(source: str | Path, gguf_file: str | None) -> tuple[Path | None, str | None]:
    """The local folder, and its file of GGUF weights where it has no other."""
    path = Path(source)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{source}: a file; expected a model folder, a .gguf file or a hub name")
        return path.parent, path.name
    if not path.is_dir():
        if path.is_absolute() or str(source).startswith((".", "~")):
            raise ModelError(f"{source}: no such folder; expected a model folder, a .gguf file or a hub name")
        return None, gguf_file
    if gguf_file is not None and not (path / gguf_file).is_file():
        raise ModelError(f"{path / gguf_file}: no such file; expected the GGUF weights that --gguf-file names")
    if gguf_file is None and not (path / "config.json").exists():
        weights = sorted(file.name for file in path.glob("*.gguf"))
        checkpoints = sorted(folder.name for folder in path.glob("checkpoint-*") if (folder / "config.json").exists())
        if checkpoints:
            raise ModelError(
                f"{source}: a training run's folder; expected one of its models, such as {path / checkpoints[-1]}"
            )
        if len(weights) != 1:
            raise ModelError(
                f"{source}: found no config.json and {len(weights)} .gguf files; expected a Transformers model folder, "
                "or one .gguf file (choose with --gguf-file)"
            )
        gguf_file = weights[0]
    return path, gguf_file


def _loaded(name: str, *, options: dict[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    return load_pretrained(
        "AutoModelForCausalLM",
        name,
        name=name,
        purpose="a causal language model",
        expected="a Hugging Face model folder or hub name with safetensors weights, or GGUF weights",
        whole="a complete causal language model (its fresh random values would be traced otherwise)",
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
    """Run a few tokens: check that backbone and head give the model's own logits, and see who shares an input."""
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
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(f"{source}: {type(module).__name__} cannot be run from embeddings ({reason})") from None
    finally:
        for handle in handles:
            handle.remove()
    if not torch.isfinite(expected).all():
        raise ModelError(
            f"{source}: the logits of a few tokens are NaN or infinite, expected finite ones; its weights are too "
            "large for the computation, or damaged"
        )
    tolerance = 1e-3 if head.weight.dtype == torch.float32 else 5e-2
    if not torch.allclose(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())):
        raise ModelError(
            f"{source}: {type(module).__name__} computes logits in a way that trackstar does not know (they differ by "
            f"{float((found - expected).abs().max()):.3g} from a linear head's); please report this architecture"
        )
    unused = [matrix.name for matrix in matrices if matrix.name not in inputs]
    if unused:
        raise ModelError(
            f"{source}: {unused[0]} takes no part in the forward pass; leave it out by --attention-pattern"
        )
    leaders: dict[int, str] = {}
    return {name: leaders.setdefault(id(tensor), name) for name, tensor in inputs.items()}


def matrix_shapes(model: LanguageModel) -> list[tuple[str, int, int]]:
    """Name, rows and columns of each covered matrix, in order."""
    return [(matrix.name, matrix.rows, matrix.columns) for matrix in model.matrices]


def dtype_name(model: LanguageModel) -> str:
    """The name of the dtype that gradients are computed in."""
    return str(model.dtype).removeprefix("torch.")
