"""Fixtures that the whole suite shares; nothing heavy is imported until a test asks for it."""

import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from tiny_models import TinyModel, TinyModelFolder

# Tests need no network, and one thread a test is faster for tiny models than several.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# The same examples on every run: a failure seen once is seen again.
hypothesis.settings.register_profile("trackstar", deadline=None, derandomize=True, database=None, max_examples=30)
hypothesis.settings.load_profile("trackstar")


@pytest.fixture(scope="session")
def tiny_models() -> "TinyModel":
    """Architecture to its tiny model, made once a session; do not change its weights."""
    from tiny_models import tiny_model

    return functools.cache(tiny_model)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> "PreTrainedTokenizerFast":
    """The tiny tokenizer that puts <s> before training text."""
    from tiny_models import tiny_tokenizer

    return tiny_tokenizer("bos")


@pytest.fixture(scope="session")
def tiny_model_folders(tmp_path_factory: pytest.TempPathFactory) -> "TinyModelFolder":
    """Architecture and special tokens to a saved model folder, written once a session; do not change its files."""
    from tiny_models import SpecialTokens, save_tiny_model

    @functools.cache
    def folder(architecture: str = "llama", special_tokens: "SpecialTokens" = "bos") -> Path:
        path = tmp_path_factory.mktemp(f"{architecture}-{special_tokens}")
        return save_tiny_model(path, architecture, special_tokens=special_tokens)

    return folder


@pytest.fixture(scope="session")
def tiny_model_folder(tiny_model_folders: "TinyModelFolder") -> Path:
    """A saved tiny Llama (grouped-query attention) with the tokenizer that puts <s> before training text."""
    return tiny_model_folders("llama", "bos")
