"""The contract of the evaluators."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtune.testing import Law, laws

TASK = Path(__file__).parent / "tiny_task" / "tiny.yaml"

LAWS = [
    *laws("eval_config", "accuracy"), *laws("eval_config", "accuracy", family="gemma2", ranks=False),
    *laws("eval_config", "generate", {"eval_num_beams": 2}),
    *laws("eval_config", "benchmark", {"task": str(TASK)}),
]  # fmt: skip


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_contract(law: Law, tmp_path: Path) -> None:
    law(tmp_path)
