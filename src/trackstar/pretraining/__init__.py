"""Train a small decoder-only language model from scratch, with checkpoints that keep the optimizer's state."""

from trackstar.pretraining.checkpoints import OPTIMIZER_FILE
from trackstar.pretraining.config import PretrainingConfig
from trackstar.pretraining.optimizers import learning_rate
from trackstar.pretraining.tokenizer import train_tokenizer
from trackstar.pretraining.training import pretrain

__all__ = ["OPTIMIZER_FILE", "PretrainingConfig", "learning_rate", "pretrain", "train_tokenizer"]
