"""Every key that documents of this field name is a key of a recipe, or is answered with what is here instead."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from llmtune import LlmtuneError
from llmtune.contract.errors import ErrorList, did_you_mean, slips
from llmtune.inference.chat import GenerateConfig
from llmtune.recipe.foreign_keys import foreign_keys
from llmtune.recipe.keys import about_unknown, about_unknown_in_block, top_level_keys
from llmtune.recipe.recipe import load_recipe

DOCUMENTED = [
    line
    for line in (Path(__file__).parent / "documented_keys.txt").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
]
LOOKALIKES = {
    "pref_loss": "plot_loss", "ppo_buffer_size": "buffer_size",
    "ref_model": "model", "badam_update_ratio": "warmup_ratio",
    "use_unsloth_gc": "use_reentrant_gc", "vllm_config": "optim_config",
    "task_dir": "dataset_dir", "save_dir": "cache_dir",
    "ray_num_workers": "preprocessing_num_workers",
    "resources_per_worker": "preprocessing_num_workers", "placement_strategy": "mix_strategy",
}  # fmt: skip
"""Keys, and what a looser measure of likeness takes them for."""


def refused(recipe: dict) -> list[str]:
    with pytest.raises(LlmtuneError) as caught:
        load_recipe(recipe)
    return [str(error) for error in (caught.value.errors if isinstance(caught.value, ErrorList) else [caught.value])]


@pytest.mark.parametrize("key", DOCUMENTED)
def test_every_documented_key_is_taken_or_answered(key: str) -> None:
    if key in top_level_keys():
        assert key not in foreign_keys()
        return
    (message,) = refused({"model": "m", key: "x"})
    answer = foreign_keys()[key]
    assert message == f"recipe  {key}: no such key{answer.answer}"
    assert answer.here or len(answer.reason.split()) > 3


@pytest.mark.parametrize(("key", "other"), LOOKALIKES.items())
def test_no_key_is_taken_for_what_only_looks_like_it(key: str, other: str) -> None:
    assert "Did you mean" not in about_unknown(key)
    assert did_you_mean(key, [other]) == ""


@pytest.mark.parametrize(
    ("key", "meant"),
    [("modle", "model"), ("learning_rat", "learning_rate"), ("max_step", "max_steps"), ("pet_config", "peft_config"),
     ("gradient_acumulation_step", "gradient_accumulation_steps"), ("lr_shceduler_config", "lr_scheduler_config")],
)  # fmt: skip
def test_slips_of_the_keys_are_told(key: str, meant: str) -> None:
    assert f'Did you mean "{meant}"?' in about_unknown(key)


def test_slips_are_counted() -> None:
    assert [slips("rank", other) for other in ("rank", "rnak", "ran", "tank", "banks", "x")] == [0, 1, 1, 1, 2, 4]


def test_generation_keys_lead_to_chat() -> None:
    for field in fields(GenerateConfig):
        if field.name not in top_level_keys():
            assert f"`llmtune chat RUN {field.name}=" in foreign_keys()[field.name].here


def test_keys_in_blocks_are_answered_too() -> None:
    known = ("r", "target_modules")
    inside = "it is a key of the recipe itself; write it outside of the block. Known: r, target_modules"
    assert about_unknown_in_block("peft_config", "lora", "export_dir", known) == f'no such key for "lora": {inside}'
    told = about_unknown_in_block("peft_config", "lora", "lora_rank", known)
    assert told == 'no such key for "lora" (write r). Known: r, target_modules'
    assert "context parallelism has one way" in about_unknown_in_block("peft_config", "lora", "cp_mode", known)
    assert "`llmtune chat RUN max_length=" in about_unknown_in_block("peft_config", "lora", "max_length", known)
    assert 'Did you mean "r"?' in about_unknown_in_block("peft_config", "lora", "rr", known)
    assert about_unknown_in_block("data_config", "auto", "x", ()) == 'no such key for "auto". It has no keys'


def test_core_keys_and_blocks_are_told_in_one_round() -> None:
    found = refused(
        {
            "model": "m", "cutoff_len": "abc", "peft_config": {"name": "lora", "rnak": 3}, "data_config": "alpacca",
            "optim_config": {"betas": 3}, "max_length": 7,
        }
    )  # fmt: skip
    keys = ["max_length", "cutoff_len", "peft_config.rnak", "data_config", "optim_config.betas"]
    assert [message.split("  ")[1].partition(":")[0] for message in found] == keys
