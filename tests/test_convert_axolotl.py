"""What Axolotl does beyond its keys' names is in the recipe, or is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmtune.conversion.convert import _word
from llmtune.inference.inspect import check_data
from llmtune.recipe.recipe import parse_overrides
from tests.test_convert import made_of

AXOLOTL = {"base_model": "m", "datasets": [{"path": "rows.jsonl", "type": "chat_template"}], "learning_rate": 1e-4,
           "micro_batch_size": 1, "num_epochs": 3, "adapter": "lora", "val_set_size": 0.1}  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"eval_steps": 50}, {"eval_strategy": "steps", "eval_steps": 50}),
        ({"evals_per_epoch": 4, "saves_per_epoch": 2},
         {"eval_strategy": "steps", "eval_steps": 0.083333, "save_steps": 0.166666}),
        ({"num_epochs": 1, "evals_per_epoch": 1, "saves_per_epoch": 1},
         {"eval_strategy": "epoch", "save_strategy": "epoch"}),
        ({"save_strategy": "epoch", "eval_strategy": "no"}, {"eval_strategy": "no", "save_strategy": "epoch"}),
        ({}, {"cutoff_policy": "drop", "eval_strategy": "no"}),
        ({"excess_length_strategy": "raise"}, {"cutoff_policy": "error"}),
        ({"s2_attention": True}, {"shift_attn": True}),
        ({"chat_template": "qwen_25"}, {"template": "qwen"}),
        ({"chat_template": "phi_35"}, {"template": "phi"}),
        ({"chat_template": "jinja", "chat_template_jinja": "mine.jinja"}, {"template": "mine.jinja"}),
        ({"rl": "simpo"}, {"stage_config": {"name": "dpo", "pref_loss": "simpo", "pref_ftx": 1.0}}),
        ({"adapter": None, "bf16": True}, {"pure_bf16": True, "bf16": None}),
        ({"datasets": [{"path": "json", "data_files": ["a.jsonl", "b.jsonl"], "type": "chat_template"}]},
         {"dataset": [{"path": "a.jsonl"}, {"path": "b.jsonl"}]}),
        ({"rl": "dpo", "datasets": [{"path": "o/p", "type": "llama3.intel"}]}, {"template": "llama3"}),
        ({"rl": "dpo", "datasets": [{"path": "o/p", "type": "chatml.intel"}]},
         {"dataset": [{"path": "hub:o/p", "format": "preference", "columns": {"prompt": "question"}}],
          "template": "chatml"}),
        ({"rl": "dpo", "datasets": [{"path": "o/p", "type": {"field_prompt": "q", "field_chosen": "a",
                                                             "prompt_format": "{prompt}"}}]},
         {"dataset": [{"path": "hub:o/p", "format": "preference", "columns": {"prompt": "q", "chosen": "a"}}]}),
        ({"rl": "kto", "datasets": [{"path": "o/p", "type": {"field_completion": "a", "field_label": "good"}}]},
         {"dataset": [{"path": "hub:o/p", "format": "kto", "columns": {"completion": "a", "label": "good"}}]}),
        ({"datasets": None, "pretraining_dataset": [{"path": "o/p", "text_column": "body"}]},
         {"dataset": [{"path": "hub:o/p", "format": "text", "columns": {"text": "body"}}]}),
        ({"cosine_min_lr_ratio": 0.1, "tokens": ["<a>"]},
         {"lr_scheduler_config": {"name": "cosine", "min_lr_ratio": 0.1}, "new_special_tokens": ["<a>"]}),
        ({"rl": "grpo", "micro_batch_size": 4, "gradient_accumulation_steps": 2, "datasets": [{"path": "o/p"}],
          "trl": {"beta": 0.01, "num_generations": 4, "max_completion_length": 64, "reward_funcs": ["rw.score"],
                  "reward_weights": [2.0]}},
         {"stage_config": {"name": "grpo", "num_generations": 4, "beta": 0.01, "max_new_tokens": 64,
                           "reward_weights": [2.0]},
          "reward_config": [{"name": "function", "function": "rw:score"}],
          "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}),
        ({"datasets": [{"path": "o/p", "type": "completion"}]},
         {"stage_config": {"name": "pt"}, "cutoff_policy": None}),
    ],
)  # fmt: skip
def test_what_axolotl_does_is_written(keys: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    found = made_of(tmp_path, {**AXOLOTL, **keys}).recipe
    assert {key: found.get(key) for key in expected} == expected


@pytest.mark.parametrize(
    ("entry", "lost"),
    [
        ({"roles_to_train": ["user", "assistant"]}, "roles_to_train"),
        ({"train_on_eos": "last"}, "train_on_eos"),
        ({"shards": 10}, "shards"),
        ({"revision": "abc"}, "revision"),
        ({"split": "train[:5%]"}, "split"),
        ({"roles": {"user": ["customer"]}}, "roles"),
        ({"type": {"field_instruction": "q", "format": "Q: {instruction}"}}, "type.format"),
        ({"path": "o/p", "data_files": "a.jsonl"}, "data_files"),
    ],
)
def test_what_an_entry_of_axolotl_asks_for_besides_is_lost(entry: dict[str, Any], lost: str, tmp_path: Path) -> None:
    rows = [{"path": "rows.jsonl", "type": "chat_template", **entry}]
    assert set(made_of(tmp_path, {**AXOLOTL, "datasets": rows}).lost) == {f"datasets[0].{lost}"}


@pytest.mark.parametrize("roles", [["assistant"], ["gpt", "function_call"]])
def test_roles_that_train_in_any_case_ask_for_nothing(roles: list[str], tmp_path: Path) -> None:
    rows = [{"path": "rows.jsonl", "type": "chat_template", "roles_to_train": roles}]
    found = made_of(tmp_path, {**AXOLOTL, "datasets": rows})
    assert "datasets[0].roles_to_train" in found.idle and not found.lost


def test_own_texts_and_tokens_are_to_be_looked_at(tmp_path: Path) -> None:
    given = {
        "special_tokens": {"pad_token": "<p>", "eos_token": "<e>"},
        "datasets": [{"path": "o/p", "type": "alpaca"}],
        "chat_template": "phi_3",
    }
    said = " ".join(made_of(tmp_path, {**AXOLOTL, **given}).check)
    assert "special_tokens: eos_token <e>" in said and "rows of type alpaca as a text of its own" in said
    assert "phi_3 writes eight spaces" in said


def test_several_trackers_keep_their_keys(tmp_path: Path) -> None:
    given = {"wandb_project": "p", "use_tensorboard": True}
    found = made_of(tmp_path, {**AXOLOTL, **given})
    assert found.recipe["logger_config"] == [{"name": "wandb", "project": "p"}, {"name": "tensorboard"}]
    assert found.came["wandb_project"] == "logger_config"


def test_converted_entries_are_read(tmp_path: Path) -> None:
    """Columns and tags are those of the format."""
    rows = {
        "talks.jsonl": {"turns": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        "chats.jsonl": {"talk": [{"who": "user", "content": "Hi"}, {"who": "assistant", "content": "Hello"}]},
        "faq.jsonl": {"question": "Why?", "answer": "So."},
    }
    for name, row in rows.items():
        (tmp_path / name).write_text(json.dumps(row) + "\n")
    data = [
        {"path": str(tmp_path / "talks.jsonl"), "type": "chat_template", "field_messages": "turns",
         "message_property_mappings": {"role": "from", "content": "value"}},
        {"path": str(tmp_path / "chats.jsonl"), "type": "chat_template", "field_messages": "talk",
         "message_field_role": "who"},
        {"path": str(tmp_path / "faq.jsonl"), "type": {"field_instruction": "question", "field_output": "answer"}},
    ]  # fmt: skip
    for entry in made_of(tmp_path, {**AXOLOTL, "datasets": data}).recipe["dataset"]:
        assert not check_data(entry).reasons, entry


def test_converted_pairs_are_read(tmp_path: Path) -> None:
    """As in Axolotl's own example: messages before two answers."""
    said = {"role": "assistant", "content": "Yes."}
    row = {"conversation": [{"role": "user", "content": "Why?"}], "good": said, "bad": {**said, "content": "No."}}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    data = {"path": str(tmp_path / "pairs.jsonl"), "type": "chat_template.default", "field_messages": "conversation",
            "field_chosen": "good", "field_rejected": "bad",
            "message_property_mappings": {"role": "role", "content": "content"}}  # fmt: skip
    found = made_of(tmp_path, {**AXOLOTL, "rl": "dpo", "datasets": [data]})
    (entry,) = found.recipe["dataset"]
    checked = check_data(entry)
    assert checked.kind == "preference" and not checked.reasons and not found.lost
    kinds = made_of(tmp_path, {**AXOLOTL, "rl": "grpo", "datasets": [{**data, "type": "rewards.transform"}]})
    assert "datasets[0].type" in kinds.lost


def test_values_of_a_typed_command_are_read_as_they_are() -> None:
    given = {"name": "lora", "adapter_name_or_path": "a,b", "of": ["x, y", "1", 2, None, True, "no: {way}"]}
    assert parse_overrides([f"peft_config={_word(given)}", f"template={_word('null')}"]) == {
        "peft_config": given, "template": "null"
    }  # fmt: skip
