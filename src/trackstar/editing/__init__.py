"""Make an index from existing ones, without computing a gradient twice (Eq. 1-3).

In: one index or several, and for `add_examples` a further corpus. Out: an index with examples added
or removed, indexes merged, rows in another codec, or projections of a smaller side.
"""
