"""How good an index is: exact neighbours, judgments, and the numbers that gates compare.

queries.py    queries and qrels from files                        I/O
stage.py      exact neighbours of queries, bucket by bucket       I/O
tuning.py     how far a search looks                              I/O
judging.py    rankings → recall, nDCG, costs; gates               pure
"""

__all__: list[str] = []
