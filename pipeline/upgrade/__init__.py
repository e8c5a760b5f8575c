"""A new model on old vectors: bridges, the ladder that judges them, and the order of a backfill.

Pure but for stage.py and backfill.py: arrays in, arrays out. Nothing is imported here: tuning.py and heads.py take torch along,
which a backfill does without.

ranking.py   exact rankings by inner products
closed.py    bridges in closed form: drift, Procrustes, ridge; anchors; orthogonal completion
tuning.py    bridges by gradient descent against the frozen old vectors
heads.py     new queries on stored old codes
choosing.py  all bridges trained, the simplest of the best chosen, its scores calibrated
exam.py      queries and documents in both spaces, and what is found held against what is wanted
ladder.py    naive swap, status quo, bridges, SLERP, cascades, partial and full backfill, oracle
ordering.py  which leaves to embed anew first
series.py    scores of several upgrades in a row
"""

__all__: list[str] = []
