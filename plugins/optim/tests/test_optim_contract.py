"""The contract of both optimisers; 8-bit states for everything, and none."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtune.testing import Law, laws

PLAIN = laws("optim_config", "adamw", {"weight_decay": 0.1, "fused": False})
FUSED = laws("optim_config", "adamw", ranks=False)
# Blocks of 256 fall otherwise on shards: states differ by their rounding, losses in the fourth digit.
BYTES = laws("optim_config", "adamw_8bit", {"min_8bit_size": 0, "full_precision_names": ()}, tolerance=3e-3)
WIDE = laws("optim_config", "adamw_8bit", {"min_8bit_size": 10**9}, ranks=False)


@pytest.mark.parametrize("law", [*PLAIN, *FUSED, *BYTES, *WIDE], ids=str)
def test_contract(law: Law, tmp_path: Path) -> None:
    law(tmp_path)
