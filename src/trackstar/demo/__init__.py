"""Real facts or sums, a small model trained on them, and the training examples behind its answers.

In: a folder and a seed. Out: corpus, model, indexes, results and a report. `run_demo` in `runner` and
`run_arithmetic_demo` in `arithmetic_runner` do it all; nothing is imported here, so that the command
line starts fast.
"""
