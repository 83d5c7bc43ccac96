"""Commands that need no torch answer without it: what each has imported once it is done."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmtune.cli.commands import parser
from llmtune.recipe.remembered import _imported_from, remembered

FOREIGN = Path(__file__).parent / "foreign"
HEAVY = {
    "torch", "transformers", "peft", "numpy", "pyarrow", "datasets", "huggingface_hub", "tokenizers", "safetensors",
    "matplotlib", "fastapi", "uvicorn", "gradio", "lm_eval", "wandb", "mlflow", "swanlab", "trackio", "tensorboard",
    "ray", "gguf", "sacrebleu", "jieba",
}  # fmt: skip
READS_A_RECIPE = {"omegaconf", "yaml", "pluggy", "packaging"}
"""What is not needed to say which commands there are."""
CODE = """
import contextlib, io, json, sys
from llmtune.cli import main
from llmtune.recipe import remembered
remembered.SETTLED_S = -1.0
watched, found = set(json.loads(sys.argv[1])), []
for words in json.loads(sys.argv[2]):
    with contextlib.redirect_stdout(io.StringIO()) as told, contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            code = main(words)
        except SystemExit as end:
            code = end.code
    found.append([words, code or 0, sorted(watched & set(sys.modules)), said.getvalue(), told.getvalue()])
print(json.dumps(found))
"""


def helps(made: argparse.ArgumentParser, words: tuple[str, ...] = ()) -> Iterator[list[str]]:
    """`--help` of every command of the core, and of every command inside one."""
    yield [*words, "--help"]
    for action in made._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                yield from helps(inner, (*words, name))


def carried_out(
    commands: list[list[str]], watched: set[str], cache: Path
) -> list[tuple[list[str], int, list[str], str, str]]:
    """Each command with its exit code, those of the watched modules that are there after it, its errors and what it
    says: all in one process, where what one imports the next would have, too."""
    given, env = [json.dumps(sorted(watched)), json.dumps(commands)], {**os.environ, "LLMTUNE_CACHE": str(cache)}
    done = subprocess.run([sys.executable, "-c", CODE, *given], capture_output=True, text=True, check=True, env=env)
    return [tuple(row) for row in json.loads(done.stdout.splitlines()[-1])]


def test_help_of_every_command_imports_nothing_that_carries_it_out(tmp_path: Path) -> None:
    commands = [words for words in helps(parser(["train"])) if words != ["--help"]]
    assert len(commands) > 20
    for words, code, imported, said, _ in carried_out([["--version"], *commands], HEAVY | READS_A_RECIPE, tmp_path):
        assert (code, imported) == (0, []), (words, said)
    ((_, code, imported, said, _),) = carried_out([["--help"]], HEAVY, tmp_path)  # lists the commands of packages, too
    assert (code, imported) == (0, []), said


def test_commands_that_need_no_torch_load_none(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    run.mkdir(parents=True)
    (run / "run.json").write_text('{"status": "done", "packages": {"llmtune": "0.1.0"}}')
    (run / "resolved.yaml").write_text("model: m\n")
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    (tmp_path / "wrong.yaml").write_text("model: m\nlearning_rat: 1\n")
    lora, evaluation = FOREIGN / "llama_factory/lora_sft.yaml", FOREIGN / "llama_factory/eval_mmlu.yaml"
    commands: dict[tuple[str, ...], int] = {
        ("runs", "list", str(tmp_path)): 0,
        ("runs", "show", str(run)): 0,
        ("runs", "compare", str(run), str(run)): 0,
        ("convert", str(lora), "-o", str(tmp_path / "here.yaml")): 0,
        ("convert", str(evaluation)): 0,
        ("convert", str(FOREIGN / "axolotl/lora.yml")): 0,
        ("plugins",): 0,
        ("plugins", "--json"): 0,
        ("plugins", "new", "mine", "--point", "peft_config", "--folder", str(tmp_path)): 0,
        ("schema",): 0,
        ("train", str(tmp_path / "gone.yaml")): 2,
        ("train", str(tmp_path / "wrong.yaml")): 2,
        ("plan", str(tmp_path / "wrong.yaml")): 2,
        ("train", str(lora)): 2,
        ("shaft",): 2,
    }
    for words, code, imported, said, _ in carried_out([*map(list, commands)], HEAVY, tmp_path):
        assert (code, imported) == (commands[tuple(words)], []), (words, said)


def test_what_was_said_of_the_installed_packages_is_said_again_without_reading_them(tmp_path: Path) -> None:
    commands = [["--help"], ["plugins"], ["plugins", "--json"], ["schema"]]
    reads = {"pluggy", "packaging", "yaml", "llmtune.recipe.registry", "importlib.metadata"}
    first, second = carried_out(commands, reads, tmp_path), carried_out(commands, reads, tmp_path)
    assert {*first[-1][2]} == reads
    assert [(words, code, imported) for words, code, imported, *_ in second] == [(words, 0, []) for words in commands]
    assert [told for *_, told in first] == [told for *_, told in second] and all(len(told) > 500 for *_, told in first)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with an installed package, `told_of`, that is imported."""
    for file in ("site/told_of/__init__.py", "site/told_of/table.yaml", "site/told_of-1.dist-info/entry_points.txt"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("LLMTUNE_CACHE", str(tmp_path / "cache"))
    importlib.import_module("told_of")
    yield tmp_path / "site"
    del sys.modules["told_of"]


def test_what_is_remembered_is_never_of_before(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    own = str(package / "told_of")
    assert own in _imported_from()
    monkeypatch.setattr("llmtune.recipe.remembered._imported_from", lambda: {own})  # not all that other tests have

    def make() -> tuple[str, bool]:
        made.append(1)
        return str(len(made)), len(made) != 2

    assert [remembered("it", make) for _ in range(2)] == ["1", "2"]  # the files are younger than any clock can tell
    monkeypatch.setattr("llmtune.recipe.remembered.SETTLED_S", -1.0)
    assert [remembered("it", make) for _ in range(3)] == ["3", "3", "3"]
    changes = [
        lambda: (package / "told_of/__init__.py").write_text("a = 1"),
        lambda: (package / "told_of/table.yaml").write_text("a: 1"),
        lambda: (package / "told_of/new.py").write_text(""),
        lambda: (package / "told_of-1.dist-info/entry_points.txt").write_text("[llmtune]"),
        lambda: shutil.copytree(package / "told_of-1.dist-info", package / "other-1.dist-info"),
        lambda: shutil.rmtree(package / "other-1.dist-info"),
        lambda: monkeypatch.setenv("LLMTUNE_BLOCK_PLUGINS", "lora"),
        lambda: monkeypatch.syspath_prepend(package / "told_of"),
        lambda: [file.write_text("{") for file in package.parent.rglob("it-*.json")],
    ]
    for number, change in enumerate(changes, 4):
        change()
        assert [remembered("it", make) for _ in range(2)] == [str(number)] * 2
    monkeypatch.setenv("LLMTUNE_CACHE", str(package / "told_of/table.yaml"))  # where nothing can be kept
    assert [remembered("it", make) for _ in range(2)] == ["13", "14"]
