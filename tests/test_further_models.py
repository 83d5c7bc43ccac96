"""Further models of a stage: the reference of preference pairs, in every place where one can be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import llmtune
from llmtune.contract.errors import LlmtuneError, PlanError
from llmtune.testing import running
from llmtune.testing.tiny import tiny_model_folder, tiny_tokenizer
from tests.spawn import in_ranks

LORA = {"name": "lora", "lora_dropout": 0.1}  # which the stage switches off
BNB = {"name": "bnb", "quantization_bit": 4}


def keys(folder: Path, **more: Any) -> dict[str, Any]:
    stage = {"name": "dpo", **more.pop("stage", {})}
    return running.tiny_recipe(folder, kind="preference", stage_config=stage, learning_rate=0.01, **more)


def found(given: dict[str, Any]) -> np.ndarray:
    """(steps, 4) what a run reports."""
    names = ("loss", "grad_norm", "rewards/margins", "logps/chosen")
    return np.array([[row[name] for name in names] for row in running.train(given).metrics])


CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"peft_config": LORA},
    "freeze": {"peft_config": "freeze"},
    "qlora": {"peft_config": LORA, "quant_config": BNB},
    "modules": {"peft_config": {**LORA, "modules_to_save": ["lm_head"]}},
    "other": {"peft_config": LORA, "stage": {"ref_model": "other", "ref_model_quantization_bit": 4}},
}


@pytest.mark.parametrize("case", CASES)
def test_runs_are_alike_on_any_ranks_layouts_and_inits(case: str, tmp_path: Path) -> None:
    more = dict(CASES[case])
    if "stage" in more:
        other = tiny_model_folder(tmp_path / "other", seed=5, initializer_range=0.2)
        more["stage"] = {**more["stage"], "ref_model": str(other)}
    expected = found(keys(tmp_path, output_dir=str(tmp_path / "padded"), **more))
    assert len(expected) == 4 and np.isfinite(expected).all()
    if "stage" not in more:  # the reference is where the model starts
        assert expected[0, 0] == pytest.approx(np.log(2), rel=1e-6)
    packed = found(keys(tmp_path, output_dir=str(tmp_path / "flat"), kernel_config={"name": "auto"}, **more))
    assert packed == pytest.approx(expected, rel=2e-4, abs=1e-5)
    for init in ("init_on_meta", "init_on_rank0"):
        given = keys(tmp_path, output_dir=str(tmp_path / init), init_config=init, gradient_accumulation_steps=1, **more)
        assert in_ranks(2, tmp_path / f"ranks-{init}", found, given)[0] == pytest.approx(expected, rel=2e-4, abs=1e-5)


def test_the_reference_of_a_continued_adapter_is_that_adapter(tmp_path: Path) -> None:
    first = llmtune.train(keys(tmp_path, output_dir=str(tmp_path / "first"), peft_config=LORA))
    adapter = {**LORA, "adapter_name_or_path": str(first.output_dir / "model")}
    again = keys(tmp_path, output_dir=str(tmp_path / "again"), peft_config=adapter)
    assert "Reference   " in str(llmtune.plan(again)) and "adapters off" not in str(llmtune.plan(again))
    assert found(again)[0, [0, 2]] == pytest.approx([np.log(2), 0.0], abs=1e-6)
    base = {**again, "output_dir": str(tmp_path / "base"), "stage_config": {"name": "dpo", "ref_model": again["model"]}}
    assert found(base)[0, 2] > 0.01  # against the base it is ahead already


def test_a_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    for case in ("full", "lora"):
        given = keys(tmp_path / case, save_steps=2, **CASES[case])
        straight = running.train({**given, "output_dir": str(tmp_path / case / "straight")})
        checkpoint = tmp_path / case / "straight" / "checkpoints" / "step-00000002"
        again = {**given, "output_dir": str(tmp_path / case / "again"), "resume_from_checkpoint": str(checkpoint)}
        for name, tensor in running.train(again).tensors.items():
            assert torch.equal(tensor, straight.tensors[name]), name


def test_the_plan_counts_the_weights_of_a_reference(tmp_path: Path) -> None:
    supervised = running.tiny_recipe(tmp_path, output_dir=str(tmp_path / "sft"))
    alone, both = llmtune.plan(supervised), llmtune.plan(keys(tmp_path))
    weights = 4 * both.model.parameters()[1]
    assert both.cost.memory.most.weights == pytest.approx(alone.cost.memory.most.weights + weights, rel=0.01)
    off = llmtune.plan(keys(tmp_path, peft_config=LORA))
    assert "Reference   the base, with its adapters off" in str(off)
    assert off.cost.memory.most.weights < 1.01 * weights


def test_what_is_wrong_with_a_reference_is_said_before_weights_are_read(tmp_path: Path) -> None:
    def planned(name: Path) -> Any:
        return llmtune.plan(keys(tmp_path, stage={"ref_model": str(name)}))

    with pytest.raises(LlmtuneError, match="stage_config dpo: ref_model: there is no folder"):
        planned(tmp_path / "none")
    other = tiny_model_folder(tmp_path, "qwen2")
    assert planned(other).further["reference"].module.config.model_type == "qwen2"
    tiny_tokenizer(vocab_size=300).save_pretrained(other)
    with pytest.raises(PlanError, match=r"has another vocabulary \(300 tokens\) than the trained model"):
        planned(other)
