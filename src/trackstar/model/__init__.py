"""The language model: load it, name its layer blocks, form its batches, generate with it.

In: a folder, a hub name or GGUF weights. Out: a `LanguageModel` with its tokenizer and the layer blocks
whose matrices' loss gradients enter Eq. 2, pooled as in §4 of the paper.
"""
