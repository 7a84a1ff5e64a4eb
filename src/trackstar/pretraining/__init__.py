"""Train a small decoder-only language model from scratch, with the optimizer's state in its checkpoints.

In: a corpus and a `PretrainingConfig`. Out: checkpoint folders, each a model folder to index, with
the optimizer's second moment V beside the weights.
"""

from trackstar.pretraining.checkpoints import OPTIMIZER_FILE
from trackstar.pretraining.config import PretrainingConfig
from trackstar.pretraining.optimizers import learning_rate
from trackstar.pretraining.tokenizer import train_tokenizer
from trackstar.pretraining.training import pretrain

__all__ = ["OPTIMIZER_FILE", "PretrainingConfig", "learning_rate", "pretrain", "train_tokenizer"]
