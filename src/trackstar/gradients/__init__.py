"""Projected loss gradients φ = P(∇Loss/√V) of examples (Eq. 2 and 4).

In: a model and tokenized examples. Out: φ of each example, and the second moment V. `per_example`
computes gradients as factors, `second_moment` is V, `projection` folds V in and projects (Eq. 4),
and `projector` runs all of it in batches.
"""
