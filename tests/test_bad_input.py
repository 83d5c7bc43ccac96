"""What people get wrong, and the sentence that tells them: nothing is trained, nothing is guessed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import llmtune
from llmtune.contract.errors import DataError, LlmtuneError, LoadError, PlanError, RecipeError
from tests.runs import recipe


def plan_error(keys: Any) -> str:
    with pytest.raises(LlmtuneError) as caught:
        llmtune.plan(keys)
    return str(caught.value)


@pytest.fixture
def keys(tiny_llama: str, chats: str, tmp_path: Path) -> dict[str, Any]:
    return recipe(tiny_llama, chats, tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lerning_rate": 1}, 'lerning_rate: no such key. Did you mean "learning_rate"?'),
        ({"learning_rate": -1}, "learning_rate: found -1, allowed is a number > 0"),
        ({"peft_config": {"name": "lora", "rnak": 3}}, "peft_config.rnak: no such key"),
        ({"peft_config": {"name": "lora", "r": 0}}, "peft_config.r: found 0, allowed is a whole number >= 1"),
        ({"peft_config": "lorra"}, 'no plugin "lorra"'),
        ({"peft_config": {"name": "lora", "target_modules": "q_prj"}}, "q_prj"),
        ({"peft_config": {"name": "freeze", "freeze_trainable_layers": 9}}, "2"),
        ({"quant_config": {"name": "bnb", "quantization_bit": 8}}, "quantization_bit"),
        ({"quant_config": "bnb", "peft_config": None}, "stored quantised and cannot train"),
        ({"quant_config": "bnb", "peft_config": "freeze"}, "freeze cannot be used with quant_config bnb"),
        ({"kernel_config": {"name": "auto", "include_kernels": "liger_rms_norm"}}, "liger_rms_norm"),
        ({"kernel_config": {"name": "auto", "include_kernels": "packed_atention"}}, "packed_attention"),
        ({"bf16": True, "fp16": True}, "fp16: found true beside bf16"),
        ({"warmup_steps": 3, "warmup_ratio": 0.1}, "warmup_ratio"),
        ({"use_reentrant_gc": True}, "use_reentrant_gc"),
        ({"model": "./absent"}, "absent"),
        ({"dataset": "./absent.jsonl"}, "absent.jsonl"),
        ({"device": "cuda"}, 'device: found "cuda", but torch sees no GPU'),
        ({"eval_strategy": "steps", "eval_steps": 0}, "eval_steps: found 0"),
        ({"save_steps": 2.5}, "save_steps: found 2.5, allowed is a whole number of steps, or below 1 a share of all"),
        ({"model_class": "cls"}, "stage_config: sft predicts tokens, and LlamaForSequenceClassification has no head"),
    ],
)
def test_a_plan_finds_it_and_names_the_key(change: dict[str, Any], said: str, keys: dict[str, Any]) -> None:
    assert said in plan_error({**keys, **change})


def test_all_errors_come_at_once_with_their_lines(tiny_llama: str, tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(f"model: {tiny_llama}\ndataset: x\nlora_rank: 3\ncutof_len: 3\nval_size: -1\n")
    said = plan_error(path).splitlines()
    assert [line.split("  ")[0] for line in said] == [f"{path}:{line}:1" for line in (3, 4, 5)]
    assert "peft_config.r" in said[0] and "cutoff_len" in said[1]


def test_plugin_and_data_errors_come_together(keys: dict[str, Any]) -> None:
    said = plan_error({**keys, "peft_config": {"name": "lora", "rnak": 3}, "dataset": "./absent.jsonl"})
    assert "rnak" in said and "absent.jsonl" in said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"messages": [\n', "rows.jsonl:1"),
        (b"\xff\xfe\x00bad\n", "UTF-8"),
        (b"", "0 rec"),
        (b'{"messages": "hello"}\n', "format could not be detected"),
        (b'{"messages": [{"role": "user", "content": "a"}]}\n', "assistant"),
        (b'{"messages": [{"role": "robot", "content": "a"}, {"role": "assistant", "content": "b"}]}\n', "robot"),
        (b'{"mesages": []}\n', "mesages"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(content: bytes, said: str, keys: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"rows\.jsonl") as caught:
        llmtune.plan({**keys, "dataset": str(path)})
    assert said.lower() in str(caught.value).lower()


def test_a_damaged_weight_file_is_named_with_its_cause(folder: Path, keys: dict[str, Any]) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(LoadError, match=r"model\.safetensors.*Git LFS pointer"):
        llmtune.plan({**keys, "model": str(folder)})
    weights.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(LoadError, match="pickle"):
        llmtune.plan({**keys, "model": str(folder)})


def test_a_model_without_a_chat_template_is_not_guessed(folder: Path, keys: dict[str, Any]) -> None:
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match="template: chatml"):
        llmtune.plan({**keys, "model": str(folder)})


def test_output_that_cannot_be_written_is_found_before_the_model_loads(keys: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PlanError, match="output_dir: .*file is a file"):
        llmtune.plan({**keys, "output_dir": str(tmp_path / "file")})


def test_code_from_a_model_folder_is_not_run(folder: Path, keys: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "configuration.Mine"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration.py").write_text("raise SystemExit('ran')")
    with pytest.raises(LoadError, match="trust_remote_code"):
        llmtune.plan({**keys, "model": str(folder)})


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="none.yaml: found nothing"):
        llmtune.plan(tmp_path / "none.yaml")


def test_the_terminal_shows_a_sentence_not_a_traceback(keys: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps({**keys, "peft_config": "lorra"}))
    done = subprocess.run(
        [sys.executable, "-m", "llmtune", "train", str(path), "--nproc", "2"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert 'no plugin "lorra"' in done.stderr
