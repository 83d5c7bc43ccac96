"""The formats that ship with llmtune keep the laws that it asks of anyone's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmtune.recipe.builtin import data_config
from llmtune.testing import Law, laws

ASK, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
OTHER = {"role": "assistant", "content": "c"}
ROWS: dict[str, list[dict[str, Any]]] = {
    "alpaca": [{"instruction": "a", "input": "b", "output": "c", "system": "s", "history": [["x", "y"]]}],
    "sharegpt": [
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"conversation": [{"human": "a", "assistant": "b"}]},
    ],
    "openai": [{"messages": [ASK, {**ANSWER, "weight": 0.5}], "enable_thinking": False}],
    "completion": [{"prompt": "a", "completion": "b"}, {"prompt": [ASK], "completion": [ANSWER]}],
    "preference": [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"chosen": [ASK, ANSWER], "rejected": [ASK, OTHER]},
        {"conversations": [{"from": "human", "value": "a"}], "chosen": {"from": "gpt", "value": "b"},
         "rejected": {"from": "gpt", "value": "c"}},
        {"messages": [ASK, ANSWER], "rejected_response": "c"},
        {"instruction": "a", "input": "", "chosen": "b", "rejected": "c"},
    ],
    "kto": [
        {"prompt": "a", "completion": "b", "label": False},
        {"messages": [ASK, ANSWER], "label": True},
        {"instruction": "a", "output": "b", "kto_tag": True},
    ],
    "prompt": [{"prompt": "a", "reference": 3}, {"prompt": [ASK]}],
    "text": [{"text": "a b c"}],
    "tokens": [{"input_ids": [1, 2], "labels": [-100, 2], "attention_mask": [1, 1]}],
}  # fmt: skip
LAWS = [law for name, rows in ROWS.items() for law in laws("data_config", name, rows=rows)]


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_contract(law: Law, tmp_path: Path) -> None:
    law(tmp_path)


def test_no_format_is_left_out() -> None:
    assert {plugin.name for plugin in data_config()} == {"auto", *ROWS}
