"""A new model on old vectors: bridges, the ladder that judges them, and the order of a backfill. Pure: arrays in, arrays out.

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

from pipeline.upgrade.choosing import Choice, choose, held_out_exam
from pipeline.upgrade.exam import Exam, Figures, Pairs, Rung
from pipeline.upgrade.heads import StoredCodes, stored_codes
from pipeline.upgrade.ladder import FULL, NAIVE, ORACLE, STATUS_QUO, cascade, climb, half_migrated
from pipeline.upgrade.ordering import by_priority, hits_of, smoothed_losses
from pipeline.upgrade.series import Compatibility, compatibility

__all__ = [
    "FULL",
    "NAIVE",
    "ORACLE",
    "STATUS_QUO",
    "Choice",
    "Compatibility",
    "Exam",
    "Figures",
    "Pairs",
    "Rung",
    "StoredCodes",
    "by_priority",
    "cascade",
    "choose",
    "climb",
    "compatibility",
    "half_migrated",
    "held_out_exam",
    "hits_of",
    "smoothed_losses",
    "stored_codes",
]
