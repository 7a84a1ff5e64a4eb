"""Dense retrieval: sentence embeddings compared by dot product (paper, §5.1: Gecko; here any model).

Model folders have the format of the sentence-transformers library. Their configuration is read
without the library.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from trackstar.baselines.interface import Pool
from trackstar.corpus import Query, query_text
from trackstar.corpus.fields import encodable
from trackstar.errors import ModelError
from trackstar.model.devices import resolved_device
from trackstar.model.loading import load_pretrained, load_pretrained_tokenizer
from trackstar.progress import Progress
from trackstar.text import one_line

Pooling = Literal["mean", "cls"]

_TEXTS_PER_BATCH = {"cpu": 32}  # larger batches do not fit a core's caches
_TEXTS_PER_BATCH_ON_ACCELERATORS = 256
_MOST_TOKENS = 512


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Encoder:
    """A sentence-embedding model; made by `load_encoder`.

    Attributes:
        module: The Transformers model, in evaluation mode and without gradients.
        tokenizer: Its tokenizer.
        pooling: `mean` of the last hidden states of all tokens, or `cls`, the last hidden state of
            the first token.
        unit_norm: Whether vectors are scaled to length 1.
        most_tokens: Number of tokens that a text is truncated to.
        query_prompt: Text put before a query.
        candidate_prompt: Text put before a candidate.
        source: Folder that the model was loaded from.
    """

    module: Any
    tokenizer: Any
    pooling: Pooling
    unit_norm: bool
    most_tokens: int
    query_prompt: str
    candidate_prompt: str
    source: str

    @torch.no_grad()
    def encode(self, texts: Sequence[str], *, progress: Progress | None = None) -> Float[Tensor, "texts width"]:
        """Encode texts; float32 on the CPU.

        Texts are encoded in batches of similar length. Up to rounding, a vector does not depend on
        the other texts. The vector of a text without tokens is zero.

        Args:
            texts: The texts, prompts included.
            progress: Progress bar, advanced by the texts of each batch.
        """
        vectors = torch.zeros(len(texts), int(self.module.config.hidden_size))
        order = sorted(range(len(texts)), key=lambda number: -len(texts[number]))
        batch_size = _TEXTS_PER_BATCH.get(self.module.device.type, _TEXTS_PER_BATCH_ON_ACCELERATORS)
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            vectors[batch] = self._encode_batch([texts[number] for number in batch])
            if progress is not None:
                progress.advance(len(batch))
        return vectors

    def _encode_batch(self, texts: list[str]) -> Float[Tensor, "texts width"]:
        inputs = self.tokenizer(
            texts, truncation=True, max_length=self.most_tokens, padding=True, padding_side="right", return_tensors="pt"
        )
        mask = inputs["attention_mask"]  # (texts, tokens)
        if not mask.any():
            return torch.zeros(len(texts), int(self.module.config.hidden_size))
        weights = mask.to(self.module.device).unsqueeze(-1).float()  # (texts, tokens, 1)
        hidden = (
            self.module(**inputs.to(self.module.device)).last_hidden_state.float() * weights
        )  # (texts, tokens, width)
        pooled = hidden[:, 0] if self.pooling == "cls" else hidden.sum(dim=1) / weights.sum(dim=1).clamp(min=1)
        return (torch.nn.functional.normalize(pooled, dim=-1) if self.unit_norm else pooled).cpu()


class EmbeddingRetriever:
    """Rank candidates by the dot product of their embedding and that of the query's prompt and completion.

    Args:
        pool: The candidates; they are embedded here, and their vectors stay in memory, 4 bytes per
            number.
        encoder: The embedding model.
        progress: Whether progress is shown.
    """

    name = "embeddings"

    def __init__(self, pool: Pool, encoder: Encoder, *, progress: bool = True) -> None:
        self._encoder = encoder
        texts = [encoder.candidate_prompt + text for text in pool.texts]
        with Progress("Embedding", unit="texts", total=len(texts), shown=progress) as bar:
            self._vectors = encoder.encode(texts, progress=bar)

    def scores(self, queries: Sequence[Query]) -> Float[Tensor, "queries candidates"]:
        """See `Retriever.scores`; cosines, from -1 to 1, if the encoder's vectors have unit norm."""
        texts = [
            self._encoder.query_prompt + encodable(query_text(query), f"query {query.query_id}: the text")
            for query in queries
        ]
        return self._encoder.encode(texts) @ self._vectors.T


def load_encoder(folder: str | Path, *, device: str = "auto") -> Encoder:
    """Load an embedding model from a sentence-transformers folder or a plain Transformers folder.

    These files are read: `modules.json` (the modules must be Transformer, Pooling and optionally
    Normalize), the Pooling module's `config.json` (mean or first token),
    `sentence_bert_config.json` (number of tokens that texts are truncated to) and
    `config_sentence_transformers.json` (prompts of queries and documents; cosine or dot product). A
    plain Transformers folder means mean pooling and unit norm. Weights are read from safetensors
    only; code that comes with a model is never run.

    Args:
        folder: The model's folder.
        device: A torch device, such as `cpu` or `cuda`.

    Raises:
        ModelError: The model cannot be loaded, or its configuration is not one of these.
        OptionError: The device is not available.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ModelError(f"{folder}: no such folder; expected the folder of a sentence-embedding model")
    transformer, pooling_folder, normalized = _modules(root)
    settings = _json(root / "config_sentence_transformers.json", default={})
    similarity = settings.get("similarity_fn_name") or "cosine"
    if similarity not in ("cosine", "dot"):
        raise ModelError(f"{folder}: expected similarity cosine or dot, found {one_line(similarity)}")
    prompts = settings.get("prompts") or {}
    module, tokenizer = _load(transformer, str(folder), device)
    encoder = Encoder(
        module=module,
        tokenizer=tokenizer,
        pooling=_pooling(pooling_folder),
        unit_norm=normalized or similarity == "cosine",
        most_tokens=_most_tokens(transformer, module, tokenizer),
        query_prompt=_prompt(prompts, "query", folder),
        candidate_prompt=_prompt(prompts, "document", folder),
        source=str(folder),
    )
    _check_usable(encoder)
    return encoder


def _modules(root: Path) -> tuple[Path, Path | None, bool]:
    """Folders of Transformer and Pooling (None without one), and whether vectors are normalized."""
    path = root / "modules.json"
    if not path.exists():
        return root, None, True
    modules = _json(path, default=None)
    expected = "expected Transformer, Pooling and optionally Normalize"
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise ModelError(f"{path}: {expected}, found no list of modules")
    kinds = [str(module.get("type", "")).rsplit(".", 1)[-1] for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ModelError(f"{path}: {expected}, found {one_line(', '.join(kinds)) or 'no module'}")
    folders = [str(module.get("path", "")) for module in modules[:2]]
    for folder in folders:
        if not (root / folder).resolve().is_relative_to(root.resolve()):
            raise ModelError(f"{path}: a module lies outside the folder ({one_line(folder)}); expected it inside")
    return root / folders[0], root / folders[1], len(kinds) == 3


def _pooling(folder: Path | None) -> Pooling:
    if folder is None:
        return "mean"
    path = folder / "config.json"
    config = _json(path, default=None)
    if not isinstance(config, dict):
        raise ModelError(f"{path}: expected the Pooling module's configuration as a JSON object, found another value")
    modes = sorted(name for name, value in config.items() if name.startswith("pooling_mode_") and value is True)
    poolings: dict[str, Pooling] = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    if len(modes) != 1 or modes[0] not in poolings or config.get("include_prompt") is False:
        found = ", ".join(modes) or "no mode"
        raise ModelError(
            f"{path}: expected either pooling_mode_mean_tokens or pooling_mode_cls_token, prompts included, found "
            f"{one_line(found)}"
        )
    return poolings[modes[0]]


def _most_tokens(folder: Path, module: Any, tokenizer: Any) -> int:
    """The lowest of the limits of the configuration, the model and the tokenizer."""
    configured = _json(folder / "sentence_bert_config.json", default={}).get("max_seq_length")
    limits = [configured, getattr(module.config, "max_position_embeddings", None), tokenizer.model_max_length]
    usable = [limit for limit in limits if isinstance(limit, int) and 0 < limit < 2**20]
    return min(usable, default=_MOST_TOKENS)


def _prompt(prompts: object, name: str, folder: str | Path) -> str:
    prompt = prompts.get(name) if isinstance(prompts, Mapping) else None
    if prompt is not None and not isinstance(prompt, str):
        raise ModelError(f"{folder}: expected a string as the prompt for {name}, found {type(prompt).__name__}")
    return prompt or ""


def _json(path: Path, *, default: Any) -> Any:
    """Content of a JSON file; `default`, unless it is None, if there is no file."""
    if default is not None and not path.exists():
        return default
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read ({one_line(error)}); expected JSON, copy the model again") from None
    if isinstance(default, dict) and not isinstance(content, dict):
        raise ModelError(f"{path}: expected a JSON object, found another value; copy the model again")
    return content


def _load(folder: Path, name: str, device: str) -> tuple[Any, Any]:
    target = resolved_device(device)
    module = load_pretrained(
        "AutoModel",
        folder,
        name=name,
        purpose="an embedding model",
        expected="a folder with config.json, safetensors weights and a tokenizer",
        whole="a complete model (its vectors would be random otherwise)",
        not_needed="pooler.",  # unused here, and often missing from the weights
        dtype=torch.float32,
    )
    return module.eval().requires_grad_(False).to(target), load_pretrained_tokenizer(folder, name=name)


def _check_usable(encoder: Encoder) -> None:
    """Encode one word, so that an unusable model is refused before a long computation.

    Raises:
        ModelError: The model raises an error, or its vectors are not finite.
    """
    try:
        vector = encoder.encode(["word"])
    except Exception as error:  # any error of the model's own code
        reason = one_line(error) or type(error).__name__
        raise ModelError(
            f"{encoder.source}: cannot encode a text ({reason}); expected an encoder such as BERT"
        ) from None
    if not torch.isfinite(vector).all():
        raise ModelError(f"{encoder.source}: expected finite vectors, found NaN or infinity; copy the model again")
