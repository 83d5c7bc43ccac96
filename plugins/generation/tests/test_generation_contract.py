"""The contract of the engine, on two kinds of models."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtune.testing import Law, laws

LAWS = [*laws("engine_config", "transformers"), *laws("engine_config", "transformers", family="qwen3", ranks=False)]


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_contract(law: Law, tmp_path: Path) -> None:
    law(tmp_path)
