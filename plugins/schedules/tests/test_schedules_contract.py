"""The contract of every schedule, at its defaults and at its limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmtune.testing import Law, laws

CASES: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}),
    ("constant", {}),
    ("cosine", {}),
    ("cosine", {"num_cycles": 1.75, "min_lr_ratio": 0.1}),
    ("polynomial", {}),
    ("polynomial", {"power": 2.5, "lr_end_ratio": 1.0}),
    ("cosine_with_restarts", {"num_cycles": 3}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
    ("inverse_sqrt", {}),
    ("warmup_stable_decay", {"num_decay_steps": 10, "min_lr_ratio": 0.1}),
    ("reduce_lr_on_plateau", {"patience": 1}),
]


@pytest.mark.parametrize("law", [law for case in CASES for law in laws("lr_scheduler_config", *case)], ids=str)
def test_contract(law: Law, tmp_path: Path) -> None:
    law(tmp_path)
