"""The contract."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtune.testing import Law, laws


@pytest.mark.parametrize("law", laws("logger_config", "tensorboard"), ids=str)
def test_contract(law: Law, tmp_path: Path) -> None:
    law(tmp_path)
