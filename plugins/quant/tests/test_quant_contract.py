"""The contract of the formats, in a few of their settings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmtune.testing import Law, laws

WIDTHS = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128}
HQQ = laws("quant_config", "hqq", {"quantization_bit": 3}, error=0.25, sizes=WIDTHS)
GPT2 = laws("quant_config", "hqq", {"group_size": 16}, family="gpt2", error=0.11, ranks=False)
TORCHAO = laws("quant_config", "torchao", error=0.01, sizes=WIDTHS, ranks=False)

# What it says of itself holds on any machine; the other laws need a GPU.
EETQ = [
    law for law in laws("quant_config", "eetq", mode="infer", ranks=False)
    if torch.cuda.is_available() or law.__name__ in (
        "is_discovered", "has_a_light_module", "documents_its_keys", "reads_its_keys", "builds_without_side_effects",
        "keeps_its_protocol", "says_that_it_quantises", "refuses_training",
    )
]  # fmt: skip


@pytest.mark.parametrize("law", [*HQQ, *GPT2, *TORCHAO, *EETQ], ids=str)
def test_contract(law: Law, tmp_path: Path) -> None:
    if law.subject.name == "torchao":
        pytest.importorskip("torchao")
    law(tmp_path)
