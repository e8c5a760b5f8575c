"""Posting files and directory: built by `stage`, read by `reader`, searched by the arithmetic of `scoring`.

training.py   sample → binarizer, heads, cut into segments          pure
assembly.py   rows → the tables of a segment                         pure
stage.py      the four build stages, on the root                     I/O
lists.py      posting lists and their directory                      I/O
partition.py  one partition opened for search                        I/O
reader.py     an index opened for search: `open_release`             I/O
scanning.py   what tuning queries meet in it                         I/O
scoring.py    candidates, re-rank order, one hit per document        pure
"""

__all__: list[str] = []
