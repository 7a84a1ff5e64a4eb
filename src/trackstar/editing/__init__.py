"""Indexes become another index, without a gradient computed twice.

In: one index or several. Out: an index with examples added or removed, merged, in another codec, or with fewer
dimensions.
"""
