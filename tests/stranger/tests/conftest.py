"""These tests are of the installed package; `tests/test_stranger.py` installs it and runs them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

collect_ignore: list[str] = []
try:
    version("acme-tuning")
except PackageNotFoundError:
    collect_ignore.append("test_acme_contract.py")
