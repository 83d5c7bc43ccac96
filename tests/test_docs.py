"""What the README and docs/ say is there, is there; the README's plugin works as printed."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import llmtune
from llmtune.cli.plugin_commands import GROUP
from llmtune.contract.extension_points import EXTENSION_POINTS
from llmtune.contract.hookspecs import HOOKS
from llmtune.contract.schema import field_types
from llmtune.planning import edit
from llmtune.recipe.foreign_keys import foreign_keys, migration_table
from llmtune.recipe.parameters import parameters_page
from llmtune.recipe.recipe import load_recipe
from llmtune.recipe.registry import Registry
from llmtune.testing import laws
from llmtune.testing.contract import Subject
from tests.runs import FLOAT32, stored_types
from tests.test_reference import first_party

__all__ = ["first_party"]

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def section(page: str, heading: str) -> str:
    """What stands below a heading of a page in docs/."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return text[text.index(f"## {heading}\n") :].split("\n## ")[0]


def test_the_two_commands_stand_in_the_readme_as_ci_reads_them() -> None:
    assert "pip install '.[plot]' ./plugins/* && llmtune train recipes/quickstart.yaml" in README.splitlines()
    assert "pip install -e '.[test]' ./plugins/* && pytest" in README.splitlines()


def test_every_page_is_on_the_site() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8").splitlines()
    pages = [page.stem for page in (ROOT / "docs").glob("*.md") if page.stem != "index"]
    assert "how-to/*" in index and [name for name in pages if name not in index] == []


@pytest.mark.parametrize("name", [*EXTENSION_POINTS, "observe"])
def test_every_hook_has_its_heading_with_its_arguments(name: str) -> None:
    arguments = ", ".join(inspect.signature(getattr(HOOKS, name)).parameters)
    lines = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8").splitlines()
    assert f"### {name}({arguments})" in lines


@pytest.mark.parametrize("record", ["Plugin", "RunContext", "ModelEdit", "LoggerStart"])
def test_the_guide_names_every_field_of_the_records(record: str) -> None:
    guide = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
    fields = getattr(llmtune, record).__dataclass_fields__
    assert [name for name in fields if f"`{name}`" not in guide] == []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_can_be_read_and_is_mentioned(path: Path) -> None:
    assert load_recipe(path).model.model
    assert any(f"recipes/{path.name}" in page.read_text(encoding="utf-8") for page in PAGES)


def test_the_page_of_parameters_is_current(first_party: Registry) -> None:
    page = (ROOT / "docs" / "parameters.md").read_text(encoding="utf-8")
    assert page == parameters_page(first_party), "run: python -m llmtune.recipe.parameters docs/parameters.md"
    assert "| `lora_rank` | int = `8` | `peft_config.r`: Inner width" in page


def test_the_migration_page_names_every_renamed_key() -> None:
    page = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
    assert migration_table() in page, "run: python -m llmtune.recipe.foreign_keys docs/migration.md"
    page += (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    assert [key for key in foreign_keys() if f"`{key}`" not in page] == []


def test_every_plugin_package_has_a_page_that_names_its_plugins_and_their_keys() -> None:
    rows = [row for row in Registry().listing() if row.plugin is not None]
    for package in sorted((ROOT / "plugins").glob("*/pyproject.toml")):
        page = (package.parent / "README.md").read_text(encoding="utf-8")
        project = tomllib.loads(package.read_text(encoding="utf-8"))["project"]
        names = [name for group in project["entry-points"].values() for name in group]
        assert names and [name for name in names if name not in page] == []
        configs = [row.plugin.config for row in rows if row.package == project["name"] and row.plugin]
        configs += [entry.load() for entry in entry_points(group=GROUP) if entry.name in names]
        assert configs
        keys = {key for config in configs for key in field_types(config)}
        assert [key for key in sorted(keys) if key not in re.findall(r"\w+", page)] == []


def test_the_guides_capability_words_are_those_of_the_plugins() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| ([^|]+) \| [^|]+ \| ([^|]+) \|$", section("plugins.md", "Capability words"), re.M
    )
    plugins = [row.plugin for row in Registry().listing() if row.plugin is not None]
    said = {
        word: tuple(set(re.findall(r"`(\w+)`", cell)) for cell in (givers, refusers)) for word, givers, refusers in rows
    }
    words = {word for plugin in plugins for word in plugin.gives | plugin.needs | plugin.refuses}
    assert sorted(said) == sorted(words)
    for word, (givers, refusers) in said.items():
        assert {plugin.name for plugin in plugins if word in plugin.gives} == givers - set(EXTENSION_POINTS)
        assert {plugin.name for plugin in plugins if word in plugin.refuses} == refusers


def test_the_guide_says_which_plugins_are_asked_for_objections(
    monkeypatch: pytest.MonkeyPatch, tiny_llama: str, chats: str, tmp_path: Path
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(edit, "plugin_objections", lambda part, *_: asked.append(part.point) or [])
    every = {"quant_config": "bnb", "peft_config": "lora", "kernel_config": "auto", "dist_config": "fsdp2"}
    keys = {"model": tiny_llama, "dataset": chats, "device": "cpu", "output_dir": str(tmp_path / "run"), **every}
    assert llmtune.plan(keys).steps
    (sentence,) = re.findall(
        r"`check` runs before `apply` and is\nasked of plugins of ([^.]+)\.",
        section("plugins.md", "What the core checks"),
    )
    assert sorted(re.findall(r"`(\w+)`", sentence)) == sorted(set(asked))


def test_the_tour_says_where_a_launchers_variables_are_read() -> None:
    variables = r'"(RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|TORCHELASTIC_\w+|MASTER_\w+)"'
    core = [path for path in (ROOT / "llmtune").rglob("*.py") if "testing" not in path.parts]
    readers = [str(path.relative_to(ROOT)) for path in core if re.search(variables, path.read_text(encoding="utf-8"))]
    told = section("tour.md", "Who may import whom").partition("The variables that a launcher sets")[2]
    assert sorted({*re.findall(r"`(llmtune/[\w/]+\.py)`", told), "llmtune/distributed/ranks.py"}) == sorted(readers)


@pytest.fixture
def readme_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The README's package, as pip would leave it, on the path."""
    site = tmp_path / "site"
    blocks = dict(re.findall(r"^`([\w./]+)`: [^\n]*\n```\w+\n(.*?)^```", README, re.M | re.S))
    for name in ("llmtune_ia3/__init__.py", "llmtune_ia3/edit.py"):
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(blocks[name], encoding="utf-8")
    # What pip writes for the package: its name and its entry points.
    info = site / "llmtune_ia3-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llmtune-ia3\nVersion: 0.1.0\n")
    entry = re.search(r"entry-points\.llmtune\]\n(.*)", blocks["pyproject.toml"])
    assert entry
    (info / "entry_points.txt").write_text("[llmtune]\n" + entry[1].replace('"', ""))
    monkeypatch.syspath_prepend(str(site))
    return site


def test_the_plugin_in_the_readme_trains(readme_plugin: Path, tmp_path: Path, tiny_llama: str, chats: str) -> None:
    keys = {
        "model": tiny_llama, "dataset": chats, "peft_config": "ia3", "quant_config": "bnb", "device": "cpu",
        "max_steps": 6, "learning_rate": 0.05, "per_device_train_batch_size": 24, "disable_shuffling": True,
        "logging_steps": 1, "cutoff_len": 128, "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    run = llmtune.train(keys)
    losses = [row["loss"] for row in run.metrics]
    assert losses[-1] < losses[0]
    assert (run.output_dir / "model" / "ia3.safetensors").exists()
    assert stored_types(run.export(tmp_path / "merged")) == FLOAT32


def test_the_guides_test_file_passes_for_the_plugin_in_the_readme(readme_plugin: Path, tmp_path: Path) -> None:
    guide = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
    section = guide[guide.index("## Testing a plugin") :]
    block = re.search(r"```python\n(.*?)```", section, re.S)
    assert block
    test = tmp_path / "tests" / "test_contract.py"
    test.parent.mkdir()
    test.write_text(block[1], encoding="utf-8")
    command = [sys.executable, "-m", "pytest", str(test), "-q", "-p", "no:cacheprovider", "-c", os.devnull]
    path = os.pathsep.join([str(readme_plugin), str(ROOT)])
    done = subprocess.run(
        [*command, f"--rootdir={test.parent}"], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stdout
    assert f"{len(laws('peft_config', 'ia3'))} passed" in done.stdout


@pytest.mark.parametrize("point", EXTENSION_POINTS)
def test_the_guide_lists_every_law_with_its_sentence(point: str) -> None:
    guide = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
    asked = laws(point, "x", reader=print, repository="me/x") + (
        laws(point, "x", mode="infer") if point == "quant_config" else []
    )
    assert [law.__name__ for law in asked if f" | `{law.__name__}` | {law.sentence} |" not in guide] == []
    fields = [field for field in Subject.__dataclass_fields__ if field not in ("point", "name", "parameters")]
    assert [name for name in fields if f"`{name}`" not in guide[guide.index("## Testing a plugin") :]] == []


@pytest.fixture
def desk(tiny_llama: str, chats: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the pages' Python speaks of, recipes of the tiny model among them."""
    (tmp_path / "recipes").mkdir()
    for recipe in RECIPES:
        own = re.sub(
            r"^(model|num_train_epochs|packing|sample_prompts): .*", r"", recipe.read_text("utf-8"), flags=re.M
        )
        text = f"model: {tiny_llama}\ndevice: cpu\nmax_steps: 2\n{own}"
        (tmp_path / "recipes" / recipe.name).write_text(text, encoding="utf-8")
    shutil.copy(tmp_path / "recipes" / "lora.yaml", tmp_path / "recipe.yaml")
    shutil.copy(chats, tmp_path / "my_chats.jsonl")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def python_of(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


def test_the_readmes_python_runs(desk: Path) -> None:
    (code,) = [block for block in python_of(README) if "llmtune.train(" in block]
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert (desk / "merged" / "config.json").exists() and (desk / "loss.png").exists()
    assert isinstance(names["run"], llmtune.Run) and names["run"].status == "done"


@pytest.mark.parametrize("page", ["costs.md", "metrics.md"])
def test_the_python_of_a_page_runs(page: str, desk: Path) -> None:
    if page == "metrics.md":
        llmtune.train("recipes/quickstart.yaml")
    blocks = python_of((ROOT / "docs" / page).read_text(encoding="utf-8"))
    assert blocks
    for code in blocks:
        exec(compile(code, page, "exec"), {"llmtune": llmtune})
