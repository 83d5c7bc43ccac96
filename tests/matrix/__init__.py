"""Every init with every base, adapter, kernel, number of ranks, ...: generated, run, compared, and written down.

`python -m tests.matrix --help` runs parts of it; `docs/matrix.md` is what it writes.
"""
