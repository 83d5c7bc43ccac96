"""Files of other trainers that ask for what may not be there: another engine, curves, the file itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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


ZERO = """compute_environment: LOCAL_MACHINE
deepspeed_config: {offload_optimizer_device: cpu, zero_stage: 3}
distributed_type: DEEPSPEED
mixed_precision: bf16
num_machines: 2
num_processes: 16
"""
FSDP = """compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config: {fsdp_offload_params: true, fsdp_sharding_strategy: SHARD_GRAD_OP}
mixed_precision: fp16
num_processes: 4
"""


@pytest.mark.parametrize(
    ("text", "expected", "ranks"),
    [
        (ZERO, {"bf16": True, "dist_config": {"name": "fsdp2", "offload_params": True}}, 8),
        (FSDP, {"fp16": True,
                "dist_config": {"name": "fsdp2", "offload_params": True, "reshard_after_forward": False}}, 4),
    ],
)  # fmt: skip
def test_what_accelerates_file_says_is_taken(text: str, expected: dict[str, Any], ranks: int, tmp_path: Path) -> None:
    file = tmp_path / "there.yaml"
    command = f"accelerate launch --config_file {file} trl/scripts/dpo.py --model_name_or_path m --dataset_name o/p"
    without = convert(command)
    assert "--config_file" in without.lost and "dist_config" not in without.recipe
    file.write_text(text)
    found = convert(command)
    assert {key: found.recipe.get(key) for key in expected} == expected and not found.lost
    assert found.command.endswith(f"--nproc {ranks}")
    assert any("2 machines" in line for line in found.check) == (ranks == 8)


def test_machines_and_processes_of_a_command(tmp_path: Path) -> None:
    (tmp_path / "f.json").write_text(json.dumps(BASE))
    for command in (f"torchrun --nnodes 2 --nproc-per-node 8 --rdzv_endpoint h:1 src/train.py {tmp_path}/f.json",
                    f"NNODES=2 NPROC_PER_NODE=8 llamafactory-cli train {tmp_path}/f.json"):  # fmt: skip
        found = convert(command)
        assert found.command == "llmtune train recipe.yaml --nproc 8"
        assert "torchrun --nnodes 2 --nproc-per-node 8 ... -m llmtune train" in " ".join(found.check)


def test_commands_that_are_not_training(tmp_path: Path) -> None:
    (tmp_path / "f.json").write_text(json.dumps({"model_name_or_path": "org/m", "template": "qwen"}))
    assert convert(f"llamafactory-cli api {tmp_path}/f.json").command == "llmtune serve org/m template=qwen"
    found = convert("llamafactory-cli webui")
    assert (found.command, found.check) == ("llmtune web", ())


@pytest.mark.parametrize(
    ("rows", "times", "group", "expected"),
    [(8, 2, 8, (2, 1)), (8, 1, 8, (1, 1)), (2, 16, 4, (2, 4)), (16, 3, 4, (12, 1))],
)
def test_answers_of_trl_are_as_many_here(rows: int, times: int, group: int, expected: tuple[int, int]) -> None:
    """A micro-batch there is of answers, here of prompts."""
    found = convert(
        f"trl grpo --model_name_or_path m --dataset_name o/p --per_device_train_batch_size {rows} "
        f"--gradient_accumulation_steps {times} --num_generations {group} --reward_funcs accuracy_reward rw.score"
    )
    size, steps = (found.recipe[key] for key in ("per_device_train_batch_size", "gradient_accumulation_steps"))
    assert (size, steps) == expected and size * steps * group == rows * times
    assert found.recipe["reward_config"] == [{"name": "function", "function": "rw:score"}]
    assert "reward_funcs: accuracy_reward" in found.lost


def test_the_decay_that_an_optimiser_has_by_itself_is_written(tmp_path: Path) -> None:
    given = {"model": "m", "train_dataset": "d.jsonl", "micro_batch_size": 1}
    found = made_of(tmp_path, given).recipe
    assert found["optim_config"] == {"name": "adamw", "weight_decay": 0.01} and found["group_by_length"] is False
    some = {"use_llama_pro": True, "finetuning_type": "freeze", "freeze_trainable_modules": "mlp"}
    assert "freeze_trainable_modules" in made(tmp_path, **some).lost


def test_torchtunes_tracker_and_columns_keep_their_names(tmp_path: Path) -> None:
    there = {
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-4}, "checkpointer": {"checkpoint_dir": "m"},
        "metric_logger": {"_component_": "torchtune.training.metric_logging.WandBLogger", "project": "tt", "name": "n"},
        "dataset": {"_component_": "torchtune.datasets.chat_dataset", "source": "json", "data_files": "c.jsonl",
                    "conversation_column": "conversations", "conversation_style": "sharegpt"},
    }  # fmt: skip
    found = made_of(tmp_path, there).recipe
    assert found["logger_config"] == {"name": "wandb", "project": "tt", "run_name": "n"}
    assert found["dataset"] == {"path": "c.jsonl", "format": "sharegpt"}
