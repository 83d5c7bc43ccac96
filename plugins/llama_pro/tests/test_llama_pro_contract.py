"""The contract: layers added to a small Llama. tests/test_docs_capabilities.py trains them on two ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtune.testing import Law, laws


@pytest.mark.parametrize("law", laws("peft_config", "llama_pro", {"num_expanded_layers": 1}, ranks=False), ids=str)
def test_contract(law: Law, tmp_path: Path) -> None:
    law(tmp_path)
