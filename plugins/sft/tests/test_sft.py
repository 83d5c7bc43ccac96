"""The contract, and which models sft refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from llmtune_sft import SftConfig, stage_config
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from llmtune.testing import Law, laws, tiny_config


@pytest.mark.parametrize("law", laws("stage_config", "sft"), ids=str)
def test_contract(law: Law, tmp_path: Path) -> None:
    law(tmp_path)


@pytest.mark.parametrize("law", laws("stage_config", "sft", family="gemma2", ranks=False), ids=str)
def test_contract_where_logits_are_capped(law: Law, tmp_path: Path) -> None:
    law(tmp_path)


def built() -> Any:
    (plugin,) = stage_config()
    return plugin.build(SftConfig())


def test_a_classifier_is_refused_and_a_language_model_is_not() -> None:
    with torch.device("meta"):
        classifier = AutoModelForSequenceClassification.from_config(tiny_config())
        speaker = AutoModelForCausalLM.from_config(tiny_config())
    (sentence,) = built().check(None, classifier)
    assert "has no head over a vocabulary; set model_class: llm" in sentence
    assert list(built().check(None, speaker)) == []
