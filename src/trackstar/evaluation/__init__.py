"""Evaluate methods on facts whose training examples are known (paper, §4 to §7).

In: a TOML file that names a model, a corpus, facts and methods. Out: a report with the paper's
tables and figures. A method is judged by the ranks of the examples that state a fact, and by the
effect of training on its proponents.
"""
