"""Eq. 2 from right to left, on a network that is small enough to see everything.

In: labelled images. Out: how often each form of the score tells a helpful training image from another,
figures, a page and a notebook. `run_microscope` in `runner` does it all; nothing is imported here, so
that the command line starts fast.
"""
