"""Audits: records from which another person can verify an answer or compute it again (Eq. 1-3).

In: a result file with its index, model, corpus and queries. Out: an audit file; for an audit file,
a report of checks.
"""
