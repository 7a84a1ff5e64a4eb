"""Train a byte-level BPE tokenizer on the corpus, which adds <s> before and </s> after training text."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trackstar.corpus.tokenization import fast_backend
from trackstar.errors import ModelError, PretrainingError
from trackstar.text import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

BOS, EOS = "<s>", "</s>"


def train_tokenizer(texts: Iterable[str], *, vocabulary: int) -> "PreTrainedTokenizerFast":
    """Train a byte-level BPE tokenizer; the same texts give the same tokenizer.

    A text's first word is tokenized as if a space preceded it, so that a name has the same tokens everywhere.

    Args:
        texts: The training texts, read once.
        vocabulary: Largest vocabulary, including the 256 bytes and the two special tokens.

    Returns:
        A fast tokenizer whose post-processor adds `<s>` before and `</s>` after a text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}",
        pair=f"{BOS} $A {EOS} {BOS} $B {EOS}",
        special_tokens=[(token, backend.token_to_id(token)) for token in (BOS, EOS)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BOS, eos_token=EOS, clean_up_tokenization_spaces=False
    )


def load_tokenizer(tokenizer: "PreTrainedTokenizerBase | str | Path") -> "PreTrainedTokenizerBase":
    """Load a fast tokenizer from a folder or hub name, or return the tokenizer itself.

    Raises:
        PretrainingError: It cannot be loaded, or is not a fast tokenizer.
    """
    loaded: Any = tokenizer
    if isinstance(tokenizer, (str, Path)):
        from transformers import AutoTokenizer

        try:
            loaded = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
        except Exception as error:  # transformers raises nearly anything for a folder that it cannot use
            raise PretrainingError(
                f"{tokenizer}: its tokenizer cannot be loaded ({one_line(error, 300) or type(error).__name__}); "
                "expected a folder with tokenizer.json or a hub name"
            ) from None
    try:
        fast_backend(loaded)
    except ModelError as error:
        raise PretrainingError(str(error)) from None
    return loaded
