"""The words that users choose between, as types."""

from typing import Literal

# What is differentiated, each summed over the target tokens: the cross-entropy, log(p/(1-p)), or the token's own logit.
Output = Literal["loss", "margin", "logit"]
CodecName = Literal["float32", "bfloat16", "float16", "int8", "4-bit", "2-bit", "1-bit"]
Coordinates = Literal["projected", "whitened"]
ProjectionKind = Literal["two-sided", "one-sided"]
