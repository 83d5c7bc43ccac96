"""What recipes say in more than one way, what stays secret, and whom an error blames."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import llmtune
from llmtune import LlmtuneError, PlanError
from llmtune.contract.errors import ErrorList
from llmtune.recipe.recipe import load_recipe
from llmtune.recipe.secrets import hidden, is_secret
from llmtune.testing import tiny_recipe


def refused(source: Any, *overrides: str) -> list[str]:
    with pytest.raises(LlmtuneError) as caught:
        load_recipe(source, overrides)
    return [str(error) for error in (caught.value.errors if isinstance(caught.value, ErrorList) else [caught.value])]


def write(folder: Path, text: str) -> Path:
    path = folder / "my.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_values_with_one_clear_meaning_are_taken() -> None:
    keys = {"model": "m", "dataset": "a,b", "mix_strategy": "interleave_under", "interleave_probs": "0.25, 0.75"}
    nulls = dict.fromkeys(("eval_on_each_dataset", "data_shared_file_system", "packing"))
    recipe = load_recipe({**keys, **nulls})
    assert recipe.data.interleave_probs == (0.25, 0.75)
    assert [getattr(recipe.data, key) for key in nulls] == [False, False, False]
    assert recipe.resolved["interleave_probs"] == [0.25, 0.75] and recipe.resolved["packing"] is False
    (message,) = refused({**keys, "interleave_probs": "0.25, much"})
    assert "found ['0.25', 'much']" in message or 'found "0.25, much"' in message
    assert "a list of a number > 0 or the same separated by commas" in message


@pytest.mark.parametrize(
    ("key", "value", "end"),
    [
        ("cutoff_len", "abc", 'found "abc", allowed is a whole number >= 1'),
        ("cutoff_len", "12", 'found "12", allowed is a whole number >= 1; write it without quotes'),
        ("cutoff_len", "0", 'found "0", allowed is a whole number >= 1'),
        ("cutoff_len", 12.0, "found 12.0, allowed is a whole number >= 1; write 12"),
        ("cutoff_len", 12.5, "found 12.5, allowed is a whole number >= 1"),
        ("cutoff_len", None, "found null, allowed is a whole number >= 1; leave the key out for its default"),
        ("learning_rate", "fast", 'found "fast", allowed is a number > 0'),
        ("learning_rate", "1e-4", 'found "1e-4", allowed is a number > 0; write it without quotes'),
        ("plot_loss", "true", 'found "true", allowed is true or false; write it without quotes'),
        ("plot_loss", "maybe", 'found "maybe", allowed is true or false'),
        ("max_steps", "None", 'found "None", allowed is a whole number >= 1 or null; write null'),
        ("sample_prompts", "Who?", 'found "Who?", allowed is a list of text; write a list, as in [Who?]'),
        ("model_class", "lm", 'found "lm", allowed is one of "llm", "cls", "other". Did you mean "llm"?'),
        ("model_class", "transformer", 'found "transformer", allowed is one of "llm", "cls", "other"'),
    ],
)
def test_messages_fit_the_case(key: str, value: Any, end: str) -> None:
    assert refused({"model": "m", key: value}) == [f"recipe  {key}: {end}"]


def test_no_evaluation_on_the_command_line_goes_before_the_files_steps(tmp_path: Path) -> None:
    path = write(tmp_path, "model: m\nval_size: 0.1\neval_strategy: steps\neval_steps: 50\n")
    for word in ("no", "false", "epoch"):
        recipe = load_recipe(path, [f"eval_strategy={word}"])
        assert recipe.train.eval_strategy == ("epoch" if word == "epoch" else "no")
        assert recipe.train.eval_steps is None
        assert load_recipe(dict(recipe.resolved)).train == recipe.train
    (message,) = refused(path, "eval_strategy=no", "eval_steps=10")
    assert message.startswith("command line eval_steps: found 10")


def test_the_command_line_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "model: m\nval_size: 0.1\neval_strategy: epoch\nload_best_model_at_end: true\n")
    (message,) = refused(path, "eval_strategy=no")
    assert message.startswith(f"command line and {path}:4:1  load_best_model_at_end: needs evaluations")
    assert message.endswith("or this to false")
    path = write(tmp_path, "model: m\npeft_config:\n  name: lora\n  r: 4\n")
    (message,) = refused(path, "peft_config={name: lora, r: 0}", "seed=x")[1:]
    assert message.startswith("command line peft_config.r: found 0")


def test_report_to_none_says_what_none_is() -> None:
    (message,) = refused({"model": "m", "report_to": "none"})
    several = "one or several of tensorboard, wandb, mlflow, swanlab, trackio"
    assert message.endswith(f"no such key; here it is logger_config ({several}; for none leave it out)")


@pytest.mark.parametrize("key", ["output_dir", "export_dir", "tokenized_path", "dataset_dir", "cache_dir"])
def test_the_home_folder_is_meant(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert load_recipe({"model": "m", key: "~/x"}).resolved[key] == "/home/somebody/x"


@pytest.mark.parametrize(
    "key",
    ["token", "hf_token", "ms_hub_token", "swanlab_api_key", "api_key", "apikey", "API_KEY", "wandb_password", "secret",
     "client_secret", "lark_webhook_secret", "aws_secret_access_key", "access_key", "auth_token", "passwd"],
)  # fmt: skip
def test_what_looks_secret_is(key: str) -> None:
    assert is_secret(key)
    assert hidden(f"logger_config.{key}=hunter2") == f"logger_config.{key}=<hidden>"


@pytest.mark.parametrize(
    "key",
    ["new_special_tokens", "split_special_tokens", "tokenized_path", "max_new_tokens", "eos_token", "pad_token",
     "image_token", "tokenizer", "monkey", "keys", "skip_special_tokens", "bypass"],
)  # fmt: skip
def test_what_only_sounds_so_is_not(key: str) -> None:
    assert not is_secret(key)
    assert hidden(f"{key}=3") == f"{key}=3"


def test_secrets_of_plugins_reach_no_file_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = tiny_recipe(tmp_path, max_steps=1, save_steps=1, output_dir=str(tmp_path / "run"))
    recipe = {**keys, "template_kwargs": {"hf_token": "hunter2", "nested": [{"swanlab_api_key": "hunter2"}]}}
    words = ["llmtune", "train", "r.yaml", "template_kwargs.hf_token=hunter2", "template_kwargs={api_key: hunter2}"]
    monkeypatch.setattr("sys.argv", words)
    run = llmtune.train(recipe)
    held = [path for path in (tmp_path / "run").rglob("*") if path.is_file() and b"hunter2" in path.read_bytes()]
    assert held == []
    command = json.loads((run.output_dir / "run.json").read_text())["command"]
    assert command[-2:] == ["template_kwargs.hf_token=<hidden>", "template_kwargs=<hidden>"]


def test_a_misspelt_metric_is_found_in_the_plan(tmp_path: Path) -> None:
    keys = tiny_recipe(tmp_path, val_size=0.2, load_best_model_at_end=True, eval_strategy="epoch")
    with pytest.raises(PlanError, match=r'found "eval_los", allowed is one of eval_loss. Did you mean "eval_loss"\?'):
        llmtune.plan({**keys, "metric_for_best_model": "eval_los"})
    with pytest.raises(PlanError, match='found "eval_accuracy", allowed is one of eval_loss'):
        llmtune.plan({**keys, "metric_for_best_model": "eval_accuracy"})
    each = {**keys, "eval_on_each_dataset": True, "metric_for_best_model": "eval_chats_loss"}
    assert llmtune.plan(each).recipe.train.metric_for_best_model == "eval_chats_loss"


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ("alpacca", 'data_config: no plugin "alpacca" is installed. Did you mean "alpaca"?'),
        ({"name": "alpaca", "colums": 3}, 'data_config.colums: no such key for "alpaca"'),
        ({"name": 3}, "data_config: found the name 3"),
        (["alpaca"], "data_config: found a list, allowed is one plugin"),
    ],
)
def test_mistakes_in_data_config_are_answered(block: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(LlmtuneError) as caught:
        llmtune.plan(tiny_recipe(tmp_path, data_config=block, peft_config={"name": "lora", "rnak": 1}))
    assert words in str(caught.value) and "peft_config.rnak: no such key" in str(caught.value)
