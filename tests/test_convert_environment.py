"""Files of other trainers that ask for what may not be there: another engine, curves, the file itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtune import RecipeError
from llmtune.conversion.convert import convert
from tests.test_convert import BASE, made, made_of

VLLM = {"vllm_maxlen": 2048, "vllm_gpu_util": 0.8, "vllm_enforce_eager": True, "vllm_max_lora_rank": 32,
        "vllm_config": {"swap_space": 4}}  # fmt: skip


def test_an_engine_of_llama_factory_comes_with_its_keys(tmp_path: Path) -> None:
    """In a file for chat; training asks no engine there."""
    chat = {"model_name_or_path": "org/m", "template": "qwen", "infer_backend": "vllm"}
    found = made_of(tmp_path, chat | VLLM)
    assert (found.verb, found.recipe["engine_config"]) == ("chat", {"name": "vllm", **VLLM})
    assert set(VLLM) <= found.came.keys() and "vllm_command" in found.text
    for keys in ({**chat, "infer_backend": "huggingface"}, BASE):
        other = made_of(tmp_path, keys | VLLM)
        assert "engine_config" not in other.recipe and set(VLLM) <= other.idle.keys()


def test_an_engine_of_trl_comes_with_its_keys(tmp_path: Path) -> None:
    """Its server follows an adapter alone."""
    given = "trl grpo --model_name_or_path org/m --dataset_name org/rows --use_vllm true --vllm_mode server "
    given += "--vllm_server_base_url http://there:8000 --vllm_max_model_length 512"
    found = convert(given + " --use_peft true")
    assert found.recipe["engine_config"] == {
        "name": "vllm", "vllm_server_base_url": "http://there:8000", "vllm_gpu_util": 0.3, "vllm_maxlen": 512,
    }  # fmt: skip
    assert "vllm_mode" in found.idle
    corrected = convert(given + " --use_peft true --vllm_importance_sampling_clip_max 2.0 "
                        "--vllm_importance_sampling_mode token_mask")  # fmt: skip
    stage = corrected.recipe["stage_config"]
    assert (stage["sampling_correction"], stage["sampling_clip_max"]) == ("token_mask", 2.0)
    uncorrected = convert(given + " --use_peft true --vllm_importance_sampling_correction false")
    assert uncorrected.recipe["stage_config"]["sampling_correction"] is None
    without = convert(given)
    assert "engine_config" not in without.recipe and "use_vllm" in without.lost


def test_a_curve_that_cannot_be_drawn_here_is_to_be_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmtune.data.plot.find_spec", lambda name: None)
    assert "pip install llmtune[plot]" in " ".join(made(tmp_path, plot_loss=True).check)
    assert not any("plot" in line for line in made(tmp_path, plot_loss=False).check)


def test_what_is_no_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is a folder; name a file of another trainer"):
        convert(tmp_path)
    with pytest.raises(RecipeError, match="there is no such file; name a file"):
        convert(tmp_path / "nothere.yaml")
