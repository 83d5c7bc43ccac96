"""Recipes and commands that stand on the pages for users work, and the messages they explain are those of the code."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import llmtune
from llmtune.cli.commands import parser
from llmtune.recipe.recipe import load_recipe
from llmtune.training.console import figure
from tests.tiny_audio import qwen2_audio, tone
from tests.tiny_media import draw, llava

ROOT = Path(__file__).parents[1]
TASKS = sorted((ROOT / "docs" / "how-to").glob("*.md"))


def text_of(page: str) -> str:
    return (ROOT / "docs" / page).read_text(encoding="utf-8")


def files_of(page: Path) -> dict[str, str]:
    """Files that a page shows, by the names it gives them."""
    shown = re.findall(r"^`([\w.-]+)`:\n```\w+\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    return dict(shown)


def commands_of(page: Path) -> list[list[str]]:
    """The commands of llmtune that a page shows, as words without `llmtune`."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    return [
        shlex.split(line, comments=True)[1:]
        for block in blocks
        for line in block.splitlines()
        if line.startswith("llmtune ")
    ]


@pytest.fixture
def desk(chats: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the data that the pages speak of, as the present one."""
    for name in ("chats.jsonl", "more.jsonl"):
        shutil.copy(chats, tmp_path / name)
    (tmp_path / "faq.csv").write_text(files_of(ROOT / "docs" / "how-to" / "my-csv.md")["faq.csv"], encoding="utf-8")
    (tmp_path / "scenes").mkdir()
    for number in (1, 2, 3):
        draw(tmp_path / "scenes" / f"{number}.png", "blue", "circle", (32, 32))
    (tmp_path / "calls").mkdir()
    for name in ("1.wav", "2.mp3"):  # what a file holds is found out from itself
        tone(tmp_path / "calls" / name, 440.0, 0.5)
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", TASKS, ids=lambda page: page.stem)
def test_the_recipe_of_a_task_can_be_planned(page: Path, desk: Path, tiny_llama: str) -> None:
    for name, text in files_of(page).items():
        (desk / name).write_text(text, encoding="utf-8")
        if name.endswith(".yaml"):
            if name == "clips.yaml":  # its rows are read where there is torchvision: see test_torchvision
                load_recipe(desk / name)
                continue
            seen = dict.fromkeys(("scenes.yaml", "choices.yaml", "counts.yaml"), llava)
            made = {**seen, "calls.yaml": qwen2_audio}.get(name)
            model = tiny_llama if made is None else str(made(desk / made.__name__))
            plan = llmtune.plan(desk / name, model=model, device="cpu")
            assert plan.steps > 0


@pytest.mark.parametrize("page", TASKS, ids=lambda page: page.stem)
def test_the_commands_of_a_task_are_commands(page: Path, desk: Path) -> None:
    for name, text in files_of(page).items():
        (desk / name).write_text(text, encoding="utf-8")
    commands = commands_of(page)
    assert commands
    for words in commands:
        options, rest = parser(words).parse_known_args(words)
        assert [word for word in rest if "=" not in word] == []
        recipe: Any = getattr(options, "recipe", None)
        if recipe is not None:  # keys of the file and of the command line, blocks included
            load_recipe(recipe, [*options.overrides, *rest])


def test_every_task_is_listed_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in TASKS if f"docs/how-to/{page.name}" not in readme] == []


@cache
def sentences() -> str:
    """Every text in the code, a line each, with an ellipsis where values come in."""
    found: list[str] = []
    for path in [*(ROOT / "llmtune").rglob("*.py"), *(ROOT / "plugins").glob("*/llmtune_*/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else "..." for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_the_messages_that_are_explained_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| `([^`]+)` \|", text_of("troubleshooting.md"), re.M)
    assert len(rows) > 25
    pieces = [(row, piece.strip()) for row in rows for piece in row.split("...") if len(piece.strip()) > 3]
    assert [row for row, piece in pieces if piece not in sentences()] == []


def test_the_page_of_metrics_has_what_the_run_reports_and_the_terminal_shows() -> None:
    page = text_of("metrics.md")
    callbacks = (ROOT / "llmtune" / "training" / "callbacks.py").read_text(encoding="utf-8")
    block = callbacks[callbacks.index("        metrics = {") :]
    names = re.findall(r'"(\w+)": ', block[: block.index("        }\n")])
    assert len(names) >= 7 and [name for name in names if f"`{name}`" not in page] == []
    for name, value in {"learning_rate": 1e-4, "grad_norm": 0.53, "tokens_per_second": 412.0, "loss": 1.2345}.items():
        assert f"| `{name}` | `{figure(name, value)}` |" in page
