"""The contract of each part, as any author can test it."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtune.testing import Law, check_plugin, laws

GAINS = laws("peft_config", "ia3")
ON_BYTES = laws(
    "peft_config", "ia3", {"target_modules": "k_proj,down_proj"}, recipe={"quant_config": "int8_rows"}, ranks=False
)
ROWS = laws("quant_config", "int8_rows", error=0.01)
SMOOTHED = laws("stage_config", "smoothed", {"beta": 0.2})
THREAD = {"post": "Why?", "replies": [{"text": "No.", "votes": 0}, {"text": "So.", "votes": 3}]}
POLYAK = laws("optim_config", "polyak", {"momentum": 0.8})
POSSE = laws("launch_config", "posse")
FORUM = laws("data_config", "forum", {"least_votes": 2}, rows=[THREAD])


SHELVED = {"config.json": b"{}", "more/notes.txt": b"None."}


def test_the_shelf(tmp_path: Path) -> None:
    for name, content in SHELVED.items():
        file = tmp_path / "shelf" / "me" / "tiny" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    root = {"root": str(tmp_path / "shelf")}
    check_plugin("hub_config", "shelf", tmp_path, root, repository="me/tiny", files=SHELVED)


@pytest.mark.parametrize("law", [*GAINS, *ON_BYTES, *ROWS, *SMOOTHED, *POLYAK, *POSSE, *FORUM], ids=str)
def test_contract(law: Law, tmp_path: Path) -> None:
    law(tmp_path)
