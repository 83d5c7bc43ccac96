"""What newcomers do wrong first: each is told in a sentence with the way out, all mistakes of a recipe at once."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import llmtune
from llmtune.cli import main
from llmtune.contract.errors import LlmtuneError
from llmtune.contract.examples import Text
from llmtune.data.formats.row import Chosen, read_row
from llmtune.inference.chat import chat_loop
from llmtune.recipe.recipe import load_recipe
from llmtune.testing import running
from llmtune.training.out_of_memory import explain_out_of_memory


def said(**keys: object) -> str:
    with pytest.raises(LlmtuneError) as caught:
        load_recipe({"model": "m", "dataset": "d", **keys})
    return str(caught.value)


def test_a_misspelt_name_of_a_block_is_told_with_the_other_mistakes_in_it() -> None:
    message = said(peft_config={"nam": "lora", "r": 16, "lora_alfa": 32})
    assert 'peft_config.nam: no such key. Did you mean "name"?' in message and 'Did you mean "lora_alpha"?' in message
    assert 'data_config.nam: no such key. Did you mean "name"?' in said(data_config={"nam": "alpaca"})


def test_a_key_of_another_library_in_a_block(tmp_path: Path) -> None:
    with pytest.raises(LlmtuneError, match=r'peft_config.rank: no such key for "lora" \(write r\)'):
        llmtune.plan(running.tiny_recipe(tmp_path, peft_config={"name": "lora", "rank": 8}))


def test_no_plugin_and_the_same_plugin_twice() -> None:
    assert 'logger_config: found "none"; for no plugin, write logger_config: null' in said(logger_config="none")
    assert 'names "tensorboard" twice, allowed is once' in said(logger_config=["tensorboard", "tensorboard"])


@pytest.mark.parametrize("key", ["modle", "model_name_or_path"])
def test_a_key_that_is_given_under_another_name_is_not_missing_too(key: str) -> None:
    with pytest.raises(LlmtuneError) as caught:
        load_recipe({key: "m", "dataset": "d"})
    assert "required" not in str(caught.value) and "model" in str(caught.value)


def test_keys_with_dashes_and_a_missing_argument(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "recipe.yaml", "--learning-rate", "1e-3"])
    assert "keys of a recipe have no dashes: write learning_rate=..." in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["chat"])
    assert capsys.readouterr().err.strip().endswith("the following arguments are required: RUN_OR_MODEL")


def test_a_run_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    assert main(["chat", "runs/quickstrat", "--prompt", "hi"]) == 4
    assert 'there is no folder runs/quickstrat here. Did you mean "quickstart"?' in capsys.readouterr().err


def test_columns_that_no_row_has(tmp_path: Path) -> None:
    (tmp_path / "faq.csv").write_text("question,answer\nWho?,Me.\n")
    entry = {
        "path": str(tmp_path / "faq.csv"),
        "format": "alpaca",
        "columns": {"instruction": "frage", "output": "antwort"},
    }
    with pytest.raises(LlmtuneError, match=r'columns reads \w+ from "\w+", which no row has. They have'):
        llmtune.preview(running.tiny_recipe(tmp_path, dataset=[entry]))


def test_a_registry_that_names_a_file_which_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text('{"mine": {"file_name": "mine.json"}}')
    keys = running.tiny_recipe(tmp_path, dataset="mine", dataset_dir=str(tmp_path))
    with pytest.raises(LlmtuneError, match="mine, of dataset_info.json in .*: ./mine.json: read as a local path"):
        llmtune.preview(keys)


def test_a_misspelt_generation_key_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "somewhere", "--prompt", "hi", "temprature=0.1"]) == 2
    assert 'temprature: no such key. Did you mean "temperature"?' in capsys.readouterr().err


def test_results_can_be_read_by_others(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        run = llmtune.train(running.tiny_recipe(tmp_path, max_steps=1, save_steps=1, peft_config="lora"))
        merged = run.export(tmp_path / "merged", infer_dtype="float32")
    finally:
        os.umask(before)
    files = [file for folder in (run.output_dir, merged) for file in folder.rglob("*.safetensors")]
    assert len(files) > 3 and {file.stat().st_mode & 0o777 for file in files} == {0o644}


def test_a_format_that_fails_on_a_row_is_told_with_the_row() -> None:
    class Counts:
        kind, columns, required = "text", ("text", "count"), ("text",)

        def recognise(self, row: Mapping[str, Any]) -> None: ...

        def convert(self, row: Mapping[str, Any]) -> Text:
            return Text(text=row["text"] * int(row["count"]))

    with pytest.raises(LlmtuneError, match="counts failed in convert of text, count: ValueError: invalid literal"):
        read_row(Chosen(format=Counts(), name="counts", why=""), {"text": "a", "count": "many"})


def test_memory_that_runs_out_while_files_are_written_is_explained() -> None:
    panic = type("PanicException", (BaseException,), {})("PyObject pointer is null")
    explained = [(panic, llmtune.OutOfMemoryError), (KeyboardInterrupt(), KeyboardInterrupt)]
    for raised, told in explained:
        with pytest.raises(told), explain_out_of_memory(torch.device("cpu"), lambda: "step 3", list):
            raise raised


def test_answers_to_a_pipe_stand_alone() -> None:
    said: list[str] = []
    lines = iter(["hello", "again"])

    class Echo:
        completes = False

        def stream(self, text: str) -> Iterator[str]:
            yield text.upper()

    def read(prompt: str) -> str:
        assert prompt == ""
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    chat_loop(Echo(), read, said.append, guides=False)  # type: ignore[arg-type]
    assert "".join(said) == "HELLO\nAGAIN\n"
