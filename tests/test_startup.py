"""Commands that need no torch answer without it: what each has imported once it is done."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from llmtune.cli.commands import parser

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
watched, found = set(json.loads(sys.argv[1])), []
for words in json.loads(sys.argv[2]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            code = main(words)
        except SystemExit as end:
            code = end.code
    found.append([words, code or 0, sorted(watched & set(sys.modules)), said.getvalue()])
print(json.dumps(found))
"""


def helps(made: argparse.ArgumentParser, words: tuple[str, ...] = ()) -> Iterator[list[str]]:
    """`--help` of every command of the core, and of every command inside one."""
    yield [*words, "--help"]
    for action in made._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                yield from helps(inner, (*words, name))


def carried_out(commands: list[list[str]], watched: set[str]) -> list[tuple[list[str], int, list[str], str]]:
    """Each command with its exit code, those of the watched modules that are there after it, and its errors: all in
    one process, where what one imports the next would have, too."""
    given = [json.dumps(sorted(watched)), json.dumps(commands)]
    done = subprocess.run([sys.executable, "-c", CODE, *given], capture_output=True, text=True, check=True)
    return [tuple(row) for row in json.loads(done.stdout.splitlines()[-1])]


def test_help_of_every_command_imports_nothing_that_carries_it_out() -> None:
    commands = [words for words in helps(parser(["train"])) if words != ["--help"]]
    assert len(commands) > 20
    for words, code, imported, said in carried_out([["--version"], *commands], HEAVY | READS_A_RECIPE):
        assert (code, imported) == (0, []), (words, said)
    ((_, code, imported, said),) = carried_out([["--help"]], HEAVY)  # lists the commands of packages, too
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
    for words, code, imported, said in carried_out([list(words) for words in commands], HEAVY):
        assert (code, imported) == (commands[tuple(words)], []), (words, said)
