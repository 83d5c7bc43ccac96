"""The contract: plain, with every option, and on a quantised base; PEFT itself reads what was saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmtune.testing import Law, laws

NARROW = {"r": 4, "lora_dropout": 0.0}
WIDTHS = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128}


def by_peft(saved: Path, base: Path) -> Any:
    """As anyone would open an adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(saved))


PLAIN = laws("peft_config", "lora", NARROW, reader=by_peft)
DORA = laws(
    "peft_config", "lora", {**NARROW, "use_dora": True, "use_rslora": True, "target_modules": "q_proj,down_proj"},
    reader=by_peft, ranks=False,
)  # fmt: skip
HEAD = laws("peft_config", "lora", {**NARROW, "modules_to_save": "lm_head"}, reader=by_peft, ranks=False)
DROPPING = laws("peft_config", "lora", {"r": 4, "lora_dropout": 0.3}, ranks=False)
GPT2 = laws("peft_config", "lora", NARROW, family="gpt2", reader=by_peft, ranks=False)
PISSA = laws("peft_config", "lora", {**NARROW, "pissa_init": True}, reader=by_peft)
QPISSA = laws("peft_config", "lora", {**NARROW, "pissa_init": True}, recipe={"quant_config": "bnb"}, sizes=WIDTHS)
QUANTISED = laws("peft_config", "lora", NARROW, recipe={"quant_config": "bnb"}, sizes=WIDTHS)


@pytest.mark.parametrize("law", [*PLAIN, *DORA, *HEAD, *DROPPING, *GPT2, *QUANTISED, *PISSA, *QPISSA], ids=str)
def test_contract(law: Law, tmp_path: Path) -> None:
    law(tmp_path)
