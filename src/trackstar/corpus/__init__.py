"""Training examples and queries, as text and as tokens.

In: files, a `datasets.Dataset` or a sequence. Out: `Example`s and queries z_q, and their tokens with
a mask of the targets, whose cross-entropies sum to the loss of Eq. 1.
"""

from trackstar.corpus.corpus import Corpus, open_corpus
from trackstar.corpus.names import read_names
from trackstar.corpus.queries import (
    prompt_of,
    prompt_tokens,
    query_text,
    query_with_texts,
    separator,
    token_texts,
    tokenize_query,
)
from trackstar.corpus.query_files import in_template, read_queries
from trackstar.corpus.records import Example, Query, TokenizedExample
from trackstar.corpus.tokenization import Tokenizer, tokenize_example, tokenize_examples

__all__ = [
    "Corpus",
    "Example",
    "Query",
    "TokenizedExample",
    "Tokenizer",
    "in_template",
    "open_corpus",
    "prompt_of",
    "prompt_tokens",
    "query_text",
    "query_with_texts",
    "read_names",
    "read_queries",
    "separator",
    "token_texts",
    "tokenize_example",
    "tokenize_examples",
    "tokenize_query",
]
