"""Environment variables of other trainers: each has a row on the page, and does what the row says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import llmtune
from llmtune.cli import main
from llmtune.contract.environment import environment_table, variables
from llmtune.contract.extension_points import default_plugins
from llmtune.testing import tiny_recipe

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
ROWS = {
    name: answer
    for names, answer in re.findall(r"^\| (`[A-Z].*`) \| (.*) \|$", PAGE, re.M)
    for name in re.findall(r"`(\w+)`", names)
}


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "recipe.json").write_text(json.dumps(tiny_recipe(tmp_path)))
    monkeypatch.chdir(tmp_path)
    return "recipe.json"


def test_the_page_is_current_and_has_every_documented_variable() -> None:
    assert PAGE.endswith(environment_table()), "run: python -m llmtune.contract.environment docs/environment.md"
    documented = (ROOT / "tests" / "documented_keys.txt").read_text(encoding="utf-8")
    named = {line for line in documented.splitlines() if re.fullmatch(r"[A-Z][A-Z_0-9]+", line)}
    assert len(named) >= 33 and named <= set(ROWS)
    read = {
        name
        for path in (ROOT / "llmtune").rglob("*.py")
        for name in re.findall(r"\"((?:LLMTUNE|NO)_[A-Z_]+)\"", path.read_text(encoding="utf-8"))
    }
    assert read - {"LLMTUNE_PROBE"} <= set(ROWS)


@pytest.mark.parametrize("name", [name for name, answer in ROWS.items() if answer.startswith("honoured: `--")])
def test_an_option_is_taken_from_it(
    name: str, recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = {
        "NPROC_PER_NODE": ("2", "--nproc-per-node 2"), "NNODES": ("1:2", "--nnodes 1:2 "),
        "MASTER_ADDR": ("head", "--rdzv-endpoint head:29500"), "MASTER_PORT": ("7", "--rdzv-endpoint head:7 "),
    }  # fmt: skip
    if name != "NPROC_PER_NODE":
        monkeypatch.setenv("NNODES", "2")
        monkeypatch.setenv("MASTER_ADDR", "head")
    value, words = told[name]
    monkeypatch.setenv(name, value)
    assert main(["train", recipe, "--dry-run"]) == 0
    out, errors = capsys.readouterr()
    assert words in " ".join(out.split())
    assert name in errors and f"--{variables()[name].option}" in errors
    words = {"nproc": ["3"], "nnodes": ["1"], "rdzv-endpoint": ["x:1"]}[variables()[name].option]
    assert main(["train", recipe, "--dry-run", f"--{variables()[name].option}", *words]) == 0
    assert f"{name} is taken" not in capsys.readouterr().err


def test_a_plan_is_for_the_same_ranks(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"NPROC_PER_NODE": "2", "NNODES": "2", "MASTER_ADDR": "head", "RECORD_VRAM": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main(["plan", recipe]) == 0
    out, errors = capsys.readouterr()
    assert "4 ranks" in out and "NPROC_PER_NODE is taken for --nproc 2" in errors and "NNODES is taken" in errors
    assert "MASTER_ADDR" not in errors and "RECORD_VRAM is set" in errors
    assert main(["plan", recipe, "--ranks", "1"]) == 0
    out, errors = capsys.readouterr()
    assert "1 rank," in out and "NPROC_PER_NODE" not in errors


def test_no_number_is_refused(recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("NPROC_PER_NODE", "gpu")
    assert main(["train", recipe, "--dry-run"]) == 2
    assert 'NPROC_PER_NODE: found "gpu", allowed is a whole number >= 1' in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name, answer in ROWS.items() if re.match("honoured: `[a-z]", answer)])
def test_a_plugin_is_named_by_it(name: str, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ((point, plugin),) = variables()[name].sets.items()
    usual = default_plugins()[point]
    for value, found in (("1", plugin), ("true", plugin), ("0", usual)):
        monkeypatch.setenv(name, value)
        assert default_plugins()[point] == found
    monkeypatch.setenv(name, "1")
    monkeypatch.setenv("LLMTUNE_BLOCK_PLUGINS", plugin)
    with pytest.raises(llmtune.PluginError, match=f"{plugin}.*; {name} is set and names it"):
        llmtune.plan(recipe)
    llmtune.plan(recipe, **{point: usual})


@pytest.mark.parametrize("name", [name for name, answer in ROWS.items() if answer.startswith("said when it is set: ")])
def test_what_changes_nothing_is_said(
    name: str, recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, "0" if name.endswith("_DEVICES") else "1")
    assert main(["train", recipe, "--dry-run"]) == 0
    said = ROWS[name].removeprefix("said when it is set: ")
    assert f"llmtune: {name} is set: {said}" in " ".join(capsys.readouterr().err.split())
    monkeypatch.setenv(name, "" if name.endswith("_DEVICES") else "0")
    assert main(["train", recipe, "--dry-run"]) == 0
    assert name not in capsys.readouterr().err


def test_a_recipe_that_has_one_is_told(recipe: str) -> None:
    with pytest.raises(llmtune.RecipeError, match="USE_RAY: no such key: an environment variable"):
        llmtune.plan(recipe, USE_RAY=1)
