"""An audit: a record from which another person can check an answer, or compute it again.

In: a result file with its index, model and queries. Out: an audit file; or, of an audit, a report of checks.
"""
