"""The contract of each reward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import llmtune
from llmtune.testing import Law, check_plugin, laws, tiny_recipe


@pytest.mark.parametrize(
    "law",
    [
        *laws("reward_config", "rule", {"match": "number"}),
        *laws("reward_config", "rule", {"match": "exact", "ignore_case": True, "right_score": 2.0}, ranks=False),
        *laws("reward_config", "rule", {"match": "regex", "answer_pattern": "[Ii]t is"}, ranks=False),
        *laws("reward_config", "rule", {"match": "length", "max_tokens": 5}, ranks=False),
    ],
    ids=str,
)
def test_contract_of_rules(law: Law, tmp_path: Path) -> None:
    law(tmp_path)


@pytest.mark.parametrize("name", ["words", "near", "tokens", "some"])
def test_contract_of_functions(name: str, functions: str, tmp_path: Path) -> None:
    given = {"function": f"{functions}:{name}"}
    check_plugin("reward_config", "function", tmp_path / "laws", given, ranks=name == "near")


def test_contract_of_an_endpoint(server: Any, tmp_path: Path) -> None:
    check_plugin("reward_config", "endpoint", tmp_path, {"url": server.url, "batch_size": 2, "columns": ["answer"]})


@pytest.mark.parametrize(("method", "quantised"), [("full", None), ("lora", None), ("lora", 4)])
def test_contract_of_a_model(method: str, quantised: int | None, tmp_path: Path) -> None:
    """The laws ask for two ranks, which share the model."""
    more = {"peft_config": "lora"} if method == "lora" else {}
    run = llmtune.train(
        tiny_recipe(tmp_path, kind="preference", stage_config="rm", max_steps=2, learning_rate=0.01, **more)
    )
    given = {"reward_model": str(run.output_dir), "batch_size": 2, "reward_model_quantization_bit": quantised}
    check_plugin("reward_config", "model", tmp_path / "laws", given)
