"""The language model: loading it, its layer blocks, its batches, what it generates.

In: a folder, a hub name or GGUF weights. Out: a `LanguageModel` with named layer blocks and its tokenizer.
"""
