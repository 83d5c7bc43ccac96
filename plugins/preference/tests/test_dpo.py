"""Pairs: the contract of stages for several losses."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtune.testing import Law, laws


@pytest.mark.parametrize("law", laws("stage_config", "dpo"), ids=str)
def test_contract(law: Law, tmp_path: Path) -> None:
    law(tmp_path)


LORA = {"peft_config": {"name": "lora", "lora_dropout": 0.0}, "learning_rate": 0.01}


@pytest.mark.parametrize("law", laws("stage_config", "dpo", {"ld_alpha": 0.5, "pref_ftx": 0.5}, recipe=LORA), ids=str)
def test_contract_with_adapters(law: Law, tmp_path: Path) -> None:
    law(tmp_path)
