"""The fields of a model's configuration that decide its function.

Equal weights with another `rms_norm_eps`, `hidden_act` or `rope_theta` are another network. The
fields are read as Transformers resolves them, with its defaults, so that a field that is left out
of config.json counts too. Left out are fields that change nothing of what an evaluated model
computes: settings of generation and training, labels, and names.
"""

import functools
import json
from importlib.metadata import version

from transformers import GenerationConfig, PretrainedConfig

_NOT_OF_THE_FUNCTION = frozenset(
    {
        "_name_or_path",
        "architectures",
        "auto_map",
        "chunk_size_feed_forward",
        "dtype",
        "id2label",
        "initializer_factor",
        "initializer_range",
        "label2id",
        "problem_type",
        "return_dict",
        "task_specific_params",
        "torch_dtype",
        "torchscript",
        "transformers_version",
    }
)
_DROPOUT = ("dropout", "pdrop", "dropout_prob", "dropout_rate")  # off in an evaluated model


def deciding_fields(configuration: PretrainedConfig) -> dict[str, str]:
    """The fields of a language model's configuration that decide its function, as JSON texts by name."""
    fields = configuration.get_text_config().to_dict()
    return {
        name: json.dumps(fields[name], sort_keys=True, default=str)
        for name in sorted(fields)
        if name not in _NOT_OF_THE_FUNCTION and name not in _generation_fields() and not name.endswith(_DROPOUT)
    }


def libraries() -> str:
    """The libraries that compute with a model, and their versions."""
    return ", ".join(f"{name} {version(name)}" for name in ("transformers", "torch"))


@functools.cache
def _generation_fields() -> frozenset[str]:
    return frozenset(GenerationConfig().to_dict())
