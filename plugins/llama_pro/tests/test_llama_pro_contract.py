"""The contract: layers added to a small Llama."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtune.testing import Law, laws


@pytest.mark.parametrize("law", laws("peft_config", "llama_pro", {"num_expanded_layers": 1}), ids=str)
def test_contract(law: Law, tmp_path: Path) -> None:
    law(tmp_path)
