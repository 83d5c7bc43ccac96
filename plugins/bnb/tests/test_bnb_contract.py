"""The contract of every format, on widths of whole blocks and others."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtune.testing import Law, laws

WIDTHS = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128}
# 16 values spread for a normal distribution: about 0.09 of the weights' size; fp4 is a little coarser.
NF4 = laws("quant_config", "bnb", error=0.11, sizes=WIDTHS)
FP4 = laws(
    "quant_config", "bnb", {"quantization_type": "fp4", "double_quantization": False}, error=0.14, sizes=WIDTHS,
    ranks=False,
)  # fmt: skip
GPT2 = laws("quant_config", "bnb", family="gpt2", error=0.11, ranks=False)
NARROW = laws("quant_config", "bnb", error=0.11, sizes={"hidden_size": 48, "intermediate_size": 80}, ranks=False)
AUTO = laws("quant_config", "auto", error=0.11, sizes=WIDTHS, ranks=False)
# LLM.int8 rounds activations, too.
INT8 = laws("quant_config", "bnb", {"quantization_bit": 8}, mode="infer", error=0.01, tolerance=0.05)


@pytest.mark.parametrize("law", [*NF4, *FP4, *GPT2, *NARROW, *AUTO, *INT8], ids=str)
def test_contract(law: Law, tmp_path: Path) -> None:
    law(tmp_path)
