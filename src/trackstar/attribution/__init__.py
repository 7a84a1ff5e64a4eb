"""A question becomes an answer: queries and an index, or a model and a corpus, give ranked
candidates (Eq. 1-3).

In: queries and an index. Out: a `QueryReport` of proponents and opponents with their influences.
`answering` answers a file of queries, `attributor` one question after another, `streaming` a corpus
without any index.
"""
