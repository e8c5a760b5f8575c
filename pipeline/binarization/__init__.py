"""Float vectors → codes of weighted signs, and inner products estimated from codes: arrays in, arrays out.

levels.py    how many sign levels each dimension gets: from the spectrum, or as configured
binarizer.py the transform: mean, rotation, levels, weights, what was learned; to and from named tensors
fitting.py   sample → binarizer, in closed form
learning.py  binarizer and pairs of queries and documents → learned binarizer, in closed form
pooling.py   pairs that were given beside neighbours that were mined
descending.py  gradient descent, stopped early by held-out recall
distilling.py  the learned one's maps trained on the order of float inner products
network.py   the recurrent network of BEBR, which chooses the signs: forward pass
training.py  its training: rankings, and the contrast of codes
compatible.py  a binarizer of a new encoder's vectors that gets on with stored codes of an old one
choosing.py  those that are asked for, fitted, and the better one by queries held out from all
refreshing.py  what a stored one loses on a corpus that has changed
codec.py     vectors → codes, factors and offsets; codes → values
scoring.py   queries and codes → estimated inner products, for codes that are read once
scanning.py  queries and codes that stay in memory → the best rows of each query

Reading and writing files is `pipeline.index`'s part.
"""

from pipeline.binarization.binarizer import Binarizer, Block, Learned, from_tensors, to_tensors
from pipeline.binarization.choosing import Choice, choose_binarizer
from pipeline.binarization.codec import Codes, binarize, decode, truncate_codes
from pipeline.binarization.fitting import fit_binarizer
from pipeline.binarization.learning import Pairs
from pipeline.binarization.levels import choose_levels
from pipeline.binarization.refreshing import Drift, may_stay, measure_drift
from pipeline.binarization.scanning import BestRows, CodeScanner
from pipeline.binarization.scoring import Mode, rotate_queries, score

__all__ = [
    "BestRows",
    "Binarizer",
    "Block",
    "Choice",
    "CodeScanner",
    "Codes",
    "Drift",
    "Learned",
    "Mode",
    "Pairs",
    "binarize",
    "choose_binarizer",
    "choose_levels",
    "decode",
    "fit_binarizer",
    "from_tensors",
    "may_stay",
    "measure_drift",
    "rotate_queries",
    "score",
    "to_tensors",
    "truncate_codes",
]
