"""R, λ and whitening: what corrects gradients for directions that all examples share (Eq. 2-3).

In: projected gradients φ of the training examples and of a task's queries. Out: R_train and R_eval
(`autocorrelation`, `train_autocorrelation`), λ (`mixing`), R^(-1/2) (`whitening`, `low_rank_whitening`,
`rotation`), and the task's correction of an index (`task`, `low_rank`).
"""
