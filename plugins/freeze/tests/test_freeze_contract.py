"""The contract: last layers, first layers with parts outside of them, and tied weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtune.testing import Law, laws

LAST = laws("peft_config", "freeze", {"freeze_trainable_layers": 1})
FIRST = laws(
    "peft_config", "freeze", {"freeze_trainable_layers": -1, "freeze_extra_modules": "lm_head, norm"}, ranks=False
)
TIED = laws(
    "peft_config", "freeze", {"freeze_trainable_layers": 1, "freeze_extra_modules": "embed_tokens"},
    sizes={"tie_word_embeddings": True}, ranks=False,
)  # fmt: skip


@pytest.mark.parametrize("law", [*LAST, *FIRST, *TIED], ids=str)
def test_contract(law: Law, tmp_path: Path) -> None:
    law(tmp_path)
