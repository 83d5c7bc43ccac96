"""The contract, which models are refused, and pretraining on plain text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from llmtune_sft import stage_config
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from llmtune.testing import Law, laws, tiny_config


@pytest.mark.parametrize("law", [*laws("stage_config", "sft"), *laws("stage_config", "pt", ranks=False)], ids=str)
def test_contract(law: Law, tmp_path: Path) -> None:
    law(tmp_path)


@pytest.mark.parametrize("law", laws("stage_config", "sft", family="gemma2", ranks=False), ids=str)
def test_contract_where_logits_are_capped(law: Law, tmp_path: Path) -> None:
    law(tmp_path)


@pytest.mark.parametrize("number", [0, 1])
def test_a_classifier_is_refused_and_a_language_model_is_not(number: int) -> None:
    plugin = stage_config()[number]
    built: Any = plugin.build(plugin.config())
    with torch.device("meta"):
        classifier = AutoModelForSequenceClassification.from_config(tiny_config())
        speaker = AutoModelForCausalLM.from_config(tiny_config())
    (sentence,) = built.check(None, classifier)
    assert (
        f"{plugin.name} predicts tokens" in sentence and "no head over a vocabulary; set model_class: llm" in sentence
    )
    assert list(built.check(None, speaker)) == []
