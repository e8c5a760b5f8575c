"""Stages on Ray: the only package that imports it.

work.py       a unit of work, its key, its receipt
runner.py     the same units on Ray, or in this process for tests
flows.py      `run`: plan → documents → embed → build → judge → publish
estimates.py  what a plan will cost, before it costs anything
progress.py   a bar on a terminal, one log line per interval elsewhere
"""

__all__: list[str] = []
