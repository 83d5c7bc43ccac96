"""Recipes: values keep the types their text has, and what cannot be done is one sentence before anything starts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import llmtune
from llmtune.contract.errors import DataError, LlmtuneError, RecipeError
from llmtune.recipe.blocks import decode_block
from llmtune.recipe.recipe import load_recipe
from tests.runs import recipe


@dataclass(frozen=True, kw_only=True)
class AnyConfig:
    """One key of each plain type."""

    text: str = ""
    whole: int = 0
    number: float = 0.0
    switch: bool = False


def test_values_have_the_types_that_they_are_written_in(tmp_path: Path) -> None:
    """In YAML, in JSON and on the command line: a quoted 7 is text, 1e-4 a number, -2 a whole one."""
    yaml, as_json = tmp_path / "r.yaml", tmp_path / "r.json"
    block = {"name": "made_up", "text": "7", "whole": -2, "number": 1e-4, "switch": True}
    yaml.write_text('model: m\npeft_config: {name: made_up, text: "7", whole: -2, number: 1e-4, switch: yes}\n')
    as_json.write_text(json.dumps({"model": "m", "peft_config": block}))
    words = ["peft_config.text='7'", "peft_config.whole=-2", "peft_config.number=1e-4", "peft_config.switch=true"]
    expected = AnyConfig(text="7", whole=-2, number=1e-4, switch=True)
    for source, overrides in ((yaml, []), (as_json, []), ({"model": "m", "peft_config": "made_up"}, words)):
        recipe = load_recipe(source, overrides)
        made, wrong = decode_block(recipe.blocks, recipe.places, "peft_config", 0, AnyConfig)
        assert (made, wrong) == (expected, [])


@pytest.mark.parametrize("key", ["whole", "number", "switch"])
def test_text_is_not_made_into_what_it_looks_like(key: str) -> None:
    block = {"name": "made_up", key: "7"}
    recipe = load_recipe({"model": "m", "peft_config": block})
    made, (wrong,) = decode_block(recipe.blocks, recipe.places, "peft_config", 0, AnyConfig)
    assert made is None and f'peft_config.{key}: found "7"' in str(wrong)


def test_a_name_alone_is_a_block_and_references_are_followed(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model: m\nseed: 7\npeft_config: lora\noutput_dir: runs/${seed}/${peft_config.name}\n")
    found = load_recipe(path)
    assert found.blocks["peft_config"] == [("lora", {})]
    assert found.train.output_dir == "runs/7/lora"


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("dynamic_batching", True, "dynamic_batching: no such key"),
        ("padding_free", True, "padding_free: no such key"),
        ("finetuning_typ", "lora", "no such key"),
        ("lora_rank", 8, "lora_rank: no such key; here it is peft_config.r"),
        ("deepspeed", "z3.json", "deepspeed: no such key; here it is dist_config"),
        ("dpo_beta", 0.1, "dpo_beta: no such key"),
    ],
)
def test_keys_that_are_not_there_are_refused_by_name(key: str, value: Any, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe({"model": "m", key: value})
    assert said in str(caught.value)


PICTURES = [
    {"messages": [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A cat."}],
     "images": ["cat.png"]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "cat.png"}},
                                               {"type": "text", "text": "What is it?"}]},
                  {"role": "assistant", "content": "A cat."}]},
]  # fmt: skip


@pytest.mark.parametrize("row", PICTURES, ids=["column", "content"])
@pytest.mark.parametrize("packing", [False, True])
def test_pictures_are_refused_by_the_plan_not_left_out(
    packing: bool, row: dict[str, Any], tiny_llama: str, tmp_path: Path
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"rows\.jsonl.*text"):
        llmtune.plan(recipe(tiny_llama, str(data), tmp_path / "run", packing=packing))


@pytest.mark.parametrize("attention", ["auto", "disabled", "sdpa"])
def test_packing_needs_no_particular_attention_kernel(
    attention: str, tiny_llama: str, chats: str, tmp_path: Path
) -> None:
    run = llmtune.train(recipe(tiny_llama, chats, tmp_path / "run", packing=True, flash_attn=attention, max_steps=1))
    assert run.status == "done"


def test_an_attention_kernel_that_is_not_installed_is_a_sentence(tiny_llama: str, chats: str, tmp_path: Path) -> None:
    from importlib.util import find_spec

    if find_spec("flash_attn") is not None:
        pytest.skip("flash-attention is installed here")
    with pytest.raises(LlmtuneError, match="flash_attn: "):
        llmtune.plan(recipe(tiny_llama, chats, tmp_path / "run", packing=True, flash_attn="fa2"))
