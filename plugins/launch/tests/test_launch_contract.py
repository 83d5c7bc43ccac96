"""The contract of Slurm's launcher, whose ranks test_slurm.py starts; Ray's is in test_ray.py, beside its cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtune.testing import Law, laws


@pytest.mark.parametrize("law", laws("launch_config", "slurm", {"nodes": 2, "time": "1:00:00"}, ranks=False), ids=str)
def test_slurm(law: Law, tmp_path: Path) -> None:
    law(tmp_path)
