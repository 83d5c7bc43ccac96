"""The contract: OFT, plain, with a module trained in full and on a quantised base, and a tuner named in the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmtune.testing import Law, laws

WIDTHS = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128}


def by_peft(saved: Path, base: Path) -> Any:
    """As anyone would open an adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(saved))


OFT = laws("peft_config", "oft", {"oft_block_size": 8}, reader=by_peft, ranks=False)
WHOLE = laws(
    "peft_config", "oft", {"oft_block_size": 0, "oft_rank": 4, "modules_to_save": "lm_head", "module_dropout": 0.3},
    reader=by_peft, ranks=False,
)  # fmt: skip
QUANTISED = laws(
    "peft_config", "oft", {"oft_target": "q_proj, down_proj"}, recipe={"quant_config": "bnb"}, sizes=WIDTHS, ranks=False
)
NAMED = laws("peft_config", "peft", {"tuner": "IA3"}, reader=by_peft, ranks=False)


@pytest.mark.parametrize("law", [*OFT, *WHOLE, *QUANTISED, *NAMED], ids=str)
def test_contract(law: Law, tmp_path: Path) -> None:
    law(tmp_path)
