"""Dense retrieval: sentence embeddings compared by their dot product (the paper's Gecko, §5.1; here any model).

Model folders are those of the sentence-transformers library, whose configuration is read without it.
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
from trackstar.corpus.data_files import one_line
from trackstar.corpus.fields import encodable
from trackstar.errors import ModelError
from trackstar.model.loading import checked_device, load_pretrained, load_pretrained_tokenizer
from trackstar.progress import Progress

Pooling = Literal["mean", "cls"]

_TEXTS_AT_ONCE = {"cpu": 32}  # larger batches leave a core's caches
_TEXTS_AT_ONCE_ELSEWHERE = 256
_MOST_TOKENS = 512


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Encoder:
    """A model that turns texts into vectors; made by `load_encoder`.

    Attributes:
        module: The Transformers model, in evaluation mode, without its gradients.
        tokenizer: Its tokenizer.
        pooling: `mean` of the last hidden states of a text's tokens, or that of its first token (`cls`).
        unit_norm: Whether vectors are scaled to length 1.
        most_tokens: Tokens after which a text is cut off.
        query_prompt: What is put before a query.
        candidate_prompt: What is put before a candidate.
        source: The folder that it was loaded from.
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
        """Each text's vector, float32 on the CPU.

        Texts are run in batches of similar length. A text's vector does not depend on the others up to rounding.
        A text without a token gets a vector of zeros.

        Args:
            texts: What to encode, prompts included.
            progress: Told how many texts are done.
        """
        vectors = torch.zeros(len(texts), int(self.module.config.hidden_size))
        order = sorted(range(len(texts)), key=lambda place: -len(texts[place]))
        at_once = _TEXTS_AT_ONCE.get(self.module.device.type, _TEXTS_AT_ONCE_ELSEWHERE)
        for first in range(0, len(order), at_once):
            places = order[first : first + at_once]
            vectors[places] = self._batch([texts[place] for place in places])
            if progress is not None:
                progress.advance(len(places))
        return vectors

    def _batch(self, texts: list[str]) -> Float[Tensor, "texts width"]:
        inputs = self.tokenizer(
            texts, truncation=True, max_length=self.most_tokens, padding=True, padding_side="right", return_tensors="pt"
        )
        mask = inputs["attention_mask"]
        if not mask.any():
            return torch.zeros(len(texts), int(self.module.config.hidden_size))
        weights = mask.to(self.module.device).unsqueeze(-1).float()
        hidden = self.module(**inputs.to(self.module.device)).last_hidden_state.float() * weights
        pooled = hidden[:, 0] if self.pooling == "cls" else hidden.sum(dim=1) / weights.sum(dim=1).clamp(min=1)
        return (torch.nn.functional.normalize(pooled, dim=-1) if self.unit_norm else pooled).cpu()


class EmbeddingRetriever:
    """Candidates by the dot product of their embedding with that of the query's prompt and completion.

    Args:
        pool: The candidates; their embeddings are made at once and kept (4 bytes a number).
        encoder: The embedding model.
        progress: Whether there may be a bar.
    """

    name = "embeddings"

    def __init__(self, pool: Pool, encoder: Encoder, *, progress: bool = True) -> None:
        self._encoder = encoder
        texts = [encoder.candidate_prompt + text for text in pool.texts]
        with Progress("Embedding", unit="texts", total=len(texts), shown=progress) as bar:
            self._vectors = encoder.encode(texts, progress=bar)

    def scores(self, queries: Sequence[Query]) -> Float[Tensor, "queries candidates"]:
        """See `Retriever.scores`; cosines, from -1 to 1, where the encoder's vectors have unit norm."""
        texts = [
            self._encoder.query_prompt + encodable(query_text(query), f"query {query.query_id}: the text")
            for query in queries
        ]
        return self._encoder.encode(texts) @ self._vectors.T


def load_encoder(folder: str | Path, *, device: str = "cpu") -> Encoder:
    """Load an embedding model from a folder of the sentence-transformers library, or a plain Transformers one.

    Read are: `modules.json` (its modules must be a Transformer, then Pooling, then at most Normalize), the Pooling's
    `config.json` (mean or first token), `sentence_bert_config.json` (after how many tokens texts are cut off) and
    `config_sentence_transformers.json` (what is put before queries and documents; whether vectors are compared by
    cosine or dot product). A plain Transformers folder gives the mean, scaled to unit norm. Weights are read from
    safetensors alone; code that comes with a model is never run.

    Args:
        folder: The model's folder.
        device: A torch device, such as `cpu` or `cuda`.

    Raises:
        ModelError: It cannot be loaded, or its vectors are made in another way than these.
        OptionError: The device is not there.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ModelError(f"{folder}: no such folder; expected the folder of a sentence-embedding model")
    transformer, pooling_folder, normalized = _modules(root)
    settings = _json(root / "config_sentence_transformers.json", default={})
    similarity = settings.get("similarity_fn_name") or "cosine"
    if similarity not in ("cosine", "dot"):
        raise ModelError(f"{folder}: compares vectors by {one_line(similarity)}; expected cosine or dot")
    prompts = settings.get("prompts") or {}
    module, tokenizer = _loaded(transformer, str(folder), device)
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
    _try(encoder)
    return encoder


def _modules(root: Path) -> tuple[Path, Path | None, bool]:
    """The folders of the Transformer and of the Pooling (None if there is none), and whether vectors are normalized."""
    path = root / "modules.json"
    if not path.exists():
        return root, None, True
    modules = _json(path, default=None)
    expected = "expected a Transformer, then Pooling, then at most Normalize"
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise ModelError(f"{path}: not a list of modules; {expected}")
    kinds = [str(module.get("type", "")).rsplit(".", 1)[-1] for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ModelError(f"{path}: has the modules {one_line(', '.join(kinds)) or 'none'}; {expected}")
    places = [str(module.get("path", "")) for module in modules[:2]]
    for place in places:
        if not (root / place).resolve().is_relative_to(root.resolve()):
            raise ModelError(f"{path}: a module lies outside the folder ({one_line(place)}); expected it inside")
    return root / places[0], root / places[1], len(kinds) == 3


def _pooling(folder: Path | None) -> Pooling:
    if folder is None:
        return "mean"
    path = folder / "config.json"
    config = _json(path, default=None)
    if not isinstance(config, dict):
        raise ModelError(f"{path}: not a JSON object; expected the Pooling module's configuration")
    modes = sorted(name for name, value in config.items() if name.startswith("pooling_mode_") and value is True)
    known: dict[str, Pooling] = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    if len(modes) != 1 or modes[0] not in known or config.get("include_prompt") is False:
        found = ", ".join(modes) or "no mode"
        raise ModelError(
            f"{path}: pools by {one_line(found)}; expected pooling_mode_mean_tokens or pooling_mode_cls_token alone, "
            "prompts included"
        )
    return known[modes[0]]


def _most_tokens(folder: Path, module: Any, tokenizer: Any) -> int:
    """The fewest of what the configuration, the model and the tokenizer allow."""
    said = _json(folder / "sentence_bert_config.json", default={}).get("max_seq_length")
    limits = [said, getattr(module.config, "max_position_embeddings", None), tokenizer.model_max_length]
    usable = [limit for limit in limits if isinstance(limit, int) and 0 < limit < 2**20]
    return min(usable, default=_MOST_TOKENS)


def _prompt(prompts: object, name: str, folder: str | Path) -> str:
    prompt = prompts.get(name) if isinstance(prompts, Mapping) else None
    if prompt is not None and not isinstance(prompt, str):
        raise ModelError(f"{folder}: its prompt for {name} is no text; expected a string")
    return prompt or ""


def _json(path: Path, *, default: Any) -> Any:
    """What a JSON file holds; `default` where there is no file and a default is given."""
    if default is not None and not path.exists():
        return default
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read ({one_line(error)}); expected JSON; copy the model again") from None
    if isinstance(default, dict) and not isinstance(found, dict):
        raise ModelError(f"{path}: not a JSON object; expected one; copy the model again")
    return found


def _loaded(folder: Path, name: str, device: str) -> tuple[Any, Any]:
    target = checked_device(device)
    module = load_pretrained(
        "AutoModel",
        folder,
        name=name,
        purpose="an embedding model",
        expected="a folder with config.json, safetensors weights and a tokenizer",
        whole="a complete model (its vectors would be random otherwise)",
        not_needed="pooler.",  # not used here, and often left out of the weights
        dtype=torch.float32,
    )
    return module.eval().requires_grad_(False).to(target), load_pretrained_tokenizer(folder, name=name)


def _try(encoder: Encoder) -> None:
    """Encode one word, so that a model that cannot be used is refused before long work."""
    try:
        vector = encoder.encode(["word"])
    except Exception as error:  # whatever the model's own code raises
        reason = one_line(error) or type(error).__name__
        raise ModelError(f"{encoder.source}: cannot encode a text ({reason}); expected an encoder like BERT") from None
    if not torch.isfinite(vector).all():
        raise ModelError(f"{encoder.source}: its vectors are not finite; expected finite weights; copy the model again")
