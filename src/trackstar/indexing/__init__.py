"""A corpus becomes an index: φ of every training example, R_train or W_train, and V (Eq. 2-4).

In: a model, a corpus, and `IndexSettings`. Out: a finished index. `build` is the entry, `job` the
stages.
"""
