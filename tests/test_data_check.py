"""`llmtune data check`: every row read, what is wrong said by place, in the terminal, as JSON and in a file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import llmtune
from llmtune.cli import main
from llmtune.contract.errors import DataError, LoadError, PluginError, RecipeError


def chat(question: str, answer: str, **more: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **more}


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def good(tmp_path: Path) -> str:
    return write(tmp_path / "good.jsonl", [chat(f"q{number}", "a" * number) for number in range(1, 31)])


@pytest.fixture
def bad(tmp_path: Path) -> str:
    """30 rows, of which 26 are bad for three reasons."""
    wrong = [{"messages": "x"}] * 24 + [chat("q", "")]
    path = tmp_path / "bad.jsonl"
    write(path, [chat(f"q{number}", "a") for number in range(4)] + wrong)
    with path.open("a") as file:
        file.write('{"messages": [}\n')
    return str(path)


def test_a_sound_file_is_described(good: str) -> None:
    found = llmtune.check_data(good)
    assert found and found.ok and found.rows == 30 and not found.bad
    assert (found.format, found.kind, found.why) == ("openai", "conversation", "messages with role/content")
    assert found.roles == {"user": 30, "assistant": 30} and found.turns == {1: 30}
    assert found.characters == sum(len(f"q{number}") + number for number in range(1, 31))
    assert found.longest == len("q30") + 30
    assert "every row can be used" in str(found)


def test_every_bad_row_is_counted_and_the_first_are_listed(bad: str) -> None:
    found = llmtune.check_data(bad)
    assert not found and found.rows == 30
    assert found.reasons == {"messages is not a list": 24, "empty answer": 1, "unreadable": 1}
    assert [each.origin for each in found.bad] == [f"{bad}:{line}" for line in (*range(5, 23), 29, 30)]  # each reason
    said = str(found)
    assert "cannot be used: 26 rows (messages is not a list 24, " in said
    assert f'    {bad}:5: messages is not a list: "messages" is text, allowed is a list of messages' in said
    assert "... and 6 more" in said
    every = llmtune.check_data(bad, keep=None)
    assert len(every.bad) == 26 and f"{bad}:30:15: not JSON: " in str(every) and "more (" not in str(every)


def test_the_same_is_found_by_several_processes(tmp_path: Path) -> None:
    rows = [chat(f"q{number % 2500}", "a") if number % 700 else {"messages": 1} for number in range(3000)]
    source = write(tmp_path / "many.jsonl", rows)
    alone, together = (llmtune.check_data(source, workers=workers) for workers in (1, 2))
    assert vars(alone) == vars(together)
    assert alone.reasons.total() == 5 and alone.duplicates == 498


def test_rows_that_repeat_others_are_found_over_files(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [chat("q", "1"), chat("q", "2")])
    write(tmp_path / "b.jsonl", [chat("q", "2", id=7), chat("q", "3")])
    found = llmtune.check_data(str(tmp_path / "*.jsonl"))
    assert found.files == 2 and found.duplicates == 1
    assert found.repeated == [(f"{tmp_path}/a.jsonl:2", f"{tmp_path}/b.jsonl:1")]
    assert found.ok


def test_strange_rows_are_noted(tmp_path: Path) -> None:
    rows = [
        chat("q", "a"),
        chat("lost \ufffd", "a"),
        chat("end <|im_end|> it", "a"),
        chat("again <|im_end|>", "{{name}}"),
    ]
    found = llmtune.check_data(write(tmp_path / "rows.jsonl", rows))
    assert sorted(found.notes.values()) == [1, 1, 2] and found.ok
    said = str(found)
    assert "text that may be read as a special token, see split_special_tokens (2 rows, first <|im_end|> in " in said
    assert f"a place that nobody filled in (1 row, first {{{{name}}}} in {found.name}:4)" in said
    assert f"characters that were lost (1 row, first U+FFFD in {found.name}:2)" in said


def test_pairs_and_labels_are_counted(tmp_path: Path) -> None:
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    found = llmtune.check_data(write(tmp_path / "pairs.jsonl", [pair, {**pair, "chosen": "c"}]))
    assert found.kind == "preference" and found.turns == {1: 2} and found.ok
    labelled = [chat("q", "a", label=True), chat("p", "a", label=False), chat("o", "a", label=False)]
    assert llmtune.check_data(write(tmp_path / "kto.jsonl", labelled)).labels == {"wanted": 1, "not wanted": 2}


def test_the_first_rows_alone(bad: str) -> None:
    found = llmtune.check_data(bad, limit=4)
    assert found.rows == 4 and found.ok


def test_the_format_and_columns_can_be_named(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [{"question": "q", "answer": "a"}])
    with pytest.raises(DataError, match=r"format could not be detected, found the columns question, answer"):
        llmtune.check_data(source)
    columns = {"instruction": "question", "output": "answer"}
    assert llmtune.check_data({"path": source, "format": "alpaca", "columns": columns}).ok
    assert not llmtune.check_data(source, format="alpaca")
    with pytest.raises(PluginError, match='no plugin "alpac" is installed\\. Did you mean "alpaca"'):
        llmtune.check_data(source, format="alpac")


def test_a_name_in_a_registry(tmp_path: Path, good: str) -> None:
    (tmp_path / "dataset_info.json").write_text(
        json.dumps({"mine": {"file_name": "good.jsonl", "formatting": "openai"}})
    )
    found = llmtune.check_data("mine", dataset_dir=tmp_path)
    assert found.ok and found.rows == 30


def test_the_command_lists_writes_and_fails(bad: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    aside = tmp_path / "aside.jsonl"
    assert main(["data", "check", bad, "--quarantine", str(aside)]) == DataError.exit_code
    assert f"Wrote 26 bad rows to {aside}" in capsys.readouterr().out
    lines = [json.loads(line) for line in aside.read_text().splitlines()]
    assert len(lines) == 26
    assert lines[0] == {
        "origin": f"{bad}:5", "reason": "messages is not a list",
        "detail": '"messages" is text, allowed is a list of messages', "row": {"messages": "x"},
    }  # fmt: skip
    assert main(["data", "check", bad, "--json", "--all"]) == DataError.exit_code
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False and found["reasons"]["messages is not a list"] == 24 and len(found["bad"]) == 26


def test_a_sound_file_is_no_failure(good: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", good]) == 0
    assert main(["data", "check", good + "x"]) == DataError.exit_code
    assert "does not exist" in capsys.readouterr().err


def test_all_data_sets_of_a_recipe_are_checked(
    good: str, bad: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "my.yaml"
    recipe.write_text(f"model: none\ndataset: {good}\neval_dataset: {bad}\n")
    assert main(["data", "check", str(recipe)]) == DataError.exit_code
    said = capsys.readouterr().out
    assert "good.jsonl: 30 rows" in said and "bad.jsonl: 30 rows" in said


def test_mistakes_in_the_command_are_one_sentence(
    tiny_llama: str, good: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "preview", good + ".yaml"]) == RecipeError.exit_code
    assert main(["data", "stats", good + ".yaml"]) == RecipeError.exit_code
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 2 and all(line.startswith("llmtune: ") and "found nothing" in line for line in said)
    assert main(["data", "preview", good]) == RecipeError.exit_code
    assert f"{good}: is data, and a recipe is needed" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["data", "check", good, "--limit", "0"])
    assert "found 0, allowed is a whole number >= 1" in capsys.readouterr().err


def test_commands_of_a_recipe(tiny_llama: str, good: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "my.json"
    recipe.write_text(json.dumps({"model": tiny_llama, "dataset": good}))
    assert main(["data", "preview", str(recipe), "-n", "1", "cutoff_len=64"]) == 0
    assert "[[a<|im_end|>]]" in capsys.readouterr().out
    assert main(["data", "preview", str(recipe), "--rows", "3,7", "--html", str(tmp_path / "page.html")]) == 0
    assert "good.jsonl:7" in (tmp_path / "page.html").read_text()
    capsys.readouterr()
    assert main(["data", "stats", str(recipe), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["all"]["samples"] == 30
    assert main(["data", "stats", str(recipe), "cutoff_len=64"]) == 0
    assert "with the recipe's cutoff_len 64, to train on: 30 samples" in capsys.readouterr().out


def test_help_and_check_load_no_torch(good: str) -> None:
    code = (
        "import sys\nfrom llmtune.cli import main\n"
        f"assert main(['data', 'check', {good!r}]) == 0\n"
        "assert not {'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)\n"
        "try:\n    main(['data', '--help'])\nexcept SystemExit as done:\n    assert not done.code\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "check" in done.stdout and "preview" in done.stdout and "stats" in done.stdout


def test_rows_that_a_template_does_not_write_are_found_where_a_model_is_given(
    tiny_llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    called = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "2"},
    ]
    path = write(tmp_path / "calls.jsonl", [chat("q", "a"), {"messages": called}])
    alone = llmtune.check_data(path)
    assert alone.ok and not alone.rendered and "not checked: what the chat template of a model refuses" in str(alone)
    found = llmtune.check_data(path, model=tiny_llama, template="zephyr")
    assert found.rendered and not found.unchecked
    assert found.reasons == {"text not rendered": 1} and found.bad[0].origin == f"{path}:2"
    with pytest.raises(DataError, match="text not rendered"):  # as training says
        llmtune.preview({"model": tiny_llama, "template": "zephyr", "dataset": path})
    assert llmtune.check_data(path, model=tiny_llama, template="zephyr", tool_format="hermes").ok
    assert main(["data", "check", path, f"model={tiny_llama}", "template=zephyr"]) == DataError.exit_code
    recipe = tmp_path / "calls.yaml"
    keys = {"model": tiny_llama, "dataset": path, "template": "zephyr", "tool_format": "hermes"}
    recipe.write_text(json.dumps(keys))
    assert main(["data", "check", str(recipe)]) == 0
    assert main(["data", "check", str(recipe), "tool_format=null"]) == DataError.exit_code
    assert "is not in the rendering" in capsys.readouterr().out


def test_a_recipe_whose_model_cannot_be_had_says_what_was_not_checked_and_fails(
    good: str, bad: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "my.yaml"
    recipe.write_text(f"model: {tmp_path / 'nowhere'}\ndataset: {good}\n")
    assert main(["data", "check", str(recipe)]) == LoadError.exit_code
    said = capsys.readouterr().out
    assert "not checked: what the chat template of a model refuses, and what trains; the recipe's model" in said
    assert "can be used" not in said.replace("whether it can be used is not known", "")
    assert main(["data", "check", str(recipe), f"dataset={bad}"]) == DataError.exit_code
    found = llmtune.check_data(good, model=str(tmp_path / "nowhere"))
    assert not found and found.exit_code == LoadError.exit_code and not found.as_dict()["ok"]


def test_rows_that_would_leave_nothing_to_train_on_are_found_where_a_model_is_given(
    tiny_llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [chat("q", "a"), chat("q " * 200, "a"), chat("q", "a " * 200)]
    path = write(tmp_path / "long.jsonl", rows)
    found = llmtune.check_data(path, model=tiny_llama, cutoff_len=64)
    assert found.reasons == {"nothing to train on": 1} and found.losses.truncated == 2
    assert f"{path}:2: nothing to train on: cutoff_len=64 cut it and none of its tokens trains" in str(found)
    assert "cutoff_len: 2 samples cut, " in str(found) and found.as_dict()["losses"]["no_target"] == 1
    assert llmtune.check_data(path, model=tiny_llama, cutoff_len=64, cutoff_policy="drop").ok  # as the recipe wants
    unmarked = [{"input_ids": [5, 6, 7], "labels": [-100, -100, -100]}, {"input_ids": [5, 6, 7]}]
    path = write(tmp_path / "tokens.jsonl", unmarked)
    assert main(["data", "check", path, f"model={tiny_llama}"]) == DataError.exit_code
    assert f"{path}:1: nothing to train on" in capsys.readouterr().out


def test_columns_are_named_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "faq.csv"
    table.write_text("question;reply\nWhy?;So.\n", encoding="utf-8")
    assert main(["data", "check", str(table), "columns={instruction: question, output: reply}", "format=alpaca"]) == 0
    assert "every row can be used" in capsys.readouterr().out
    assert llmtune.check_data(table, format="alpaca", columns={"instruction": "question", "output": "reply"}).ok
