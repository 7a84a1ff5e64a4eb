"""Training examples and queries: what they are, how they are read, and how they become tokens."""

from trackstar.corpus.corpus import Corpus, open_corpus
from trackstar.corpus.names import read_names
from trackstar.corpus.queries import prompt_tokens, query_text, read_queries, tokenize_query
from trackstar.corpus.records import Example, Query, TokenizedExample
from trackstar.corpus.tokenization import Tokenizer, tokenize_example, tokenize_examples

__all__ = [
    "Corpus",
    "Example",
    "Query",
    "TokenizedExample",
    "Tokenizer",
    "open_corpus",
    "prompt_tokens",
    "query_text",
    "read_names",
    "read_queries",
    "tokenize_example",
    "tokenize_examples",
    "tokenize_query",
]
