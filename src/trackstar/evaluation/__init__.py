"""How good a method is, on facts whose training examples are known: metrics, tail-patch, the paper's tables."""
