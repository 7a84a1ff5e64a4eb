"""The demo: a corpus of facts of the real world, the model that is trained on it, and what moved the model's answers.

Nothing is imported here, so that the command line starts fast; `trackstar.demo.runner.run_demo` runs it all.
"""
