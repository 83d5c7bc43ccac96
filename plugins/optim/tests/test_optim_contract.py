"""The contract of every optimiser; 8-bit states for everything, and none."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtune.testing import Law, laws

PLAIN = laws("optim_config", "adamw", {"weight_decay": 0.1, "fused": False})
FUSED = laws("optim_config", "adamw", ranks=False)
# Blocks of 256 fall otherwise on shards: states differ by their rounding, losses in the fourth digit.
BYTES = laws("optim_config", "adamw_8bit", {"min_8bit_size": 0, "full_precision_names": ()}, tolerance=3e-3)
WIDE = laws("optim_config", "adamw_8bit", {"min_8bit_size": 10**9}, ranks=False)
OTHERS = [
    law
    for name, keys in {
        "galore": {"rank": 32, "update_interval": 3, "scale": 1.0}, "apollo": {"rank": 4, "update_interval": 3},
        "adam_mini": {"weight_decay": 0.1}, "adafactor": {"scale_parameter": True}, "lion": {},
        "sgd": {"momentum": 0.9}, "badam": {"switch_interval": 2},
    }.items()
    for law in laws("optim_config", name, keys)
]  # fmt: skip
OTHERS += laws("optim_config", "badam", {"mode": "ratio", "switch_interval": 3, "update_ratio": 0.9})
# Its products are of bfloat16, which turns the last digit of a gradient into the third of an update.
OTHERS += laws("optim_config", "muon", {"weight_decay": 0.1}, tolerance=3e-3)


@pytest.mark.parametrize("law", [*PLAIN, *FUSED, *BYTES, *WIDE, *OTHERS], ids=str)
def test_contract(law: Law, tmp_path: Path) -> None:
    law(tmp_path)
