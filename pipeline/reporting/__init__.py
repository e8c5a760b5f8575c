"""A release as one HTML page: what was built, how good it is, what it took.

figures.py     what a page shows, frozen                          nouns
stage.py       gathers the figures from a root, writes the page   I/O
tables.py      figures → tables of text                           pure
plots.py       figures → SVG; the only user of matplotlib         pure
page.py        tables and plots → HTML, with page.html            pure
"""

__all__: list[str] = []
