"""The files of an index, on local disks and on other file systems behind URLs.

Paths, URLs and bytes go in; files that are complete or absent, and their bytes, come out. Nothing
here depends on the format of an index.
"""
