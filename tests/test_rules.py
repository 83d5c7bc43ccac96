"""Who may import whom, and other promises about the source itself."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = sorted((ROOT / "llmtune").rglob("*.py"))
PLUGINS = sorted(path.parent for path in (ROOT / "plugins").glob("*/pyproject.toml"))
CONTRACT = {
    "llmtune.contract.records",
    "llmtune.contract.shipped",
    "llmtune.contract.stages",
    "llmtune.contract.losses",
    "llmtune.contract.examples",
    "llmtune.contract.environment",
    "llmtune.contract.evaluation",
    "llmtune.contract.generation",
    "llmtune.contract.launching",
    "llmtune.contract.loggers",
    "llmtune.contract.rewards",
    "llmtune.contract.events",
    "llmtune.contract.hookspecs",
    "llmtune.contract.hubs",
    "llmtune.contract.optimizers",
    "llmtune.contract.load_rules",
    "llmtune.contract.extension_points",
    "llmtune.contract.errors",
    "llmtune.contract.schema",
    "llmtune.contract.structure",
}


@cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    """All that a file is parsed into, which half of the rules ask for: walking through it takes longer than parsing."""
    return tuple(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


@cache
def imports(path: Path) -> list[tuple[str, bool]]:
    """Every imported module of a file, and whether the import runs when the module is imported."""
    return list(_imports(path))


def _imports(path: Path) -> Iterator[tuple[str, bool]]:
    lazy = {
        id(node)
        for outer in nodes(path)
        if isinstance(outer, (ast.FunctionDef, ast.AsyncFunctionDef))
        or (isinstance(outer, ast.If) and "TYPE_CHECKING" in ast.unparse(outer.test))
        for node in ast.walk(outer)
    }
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) not in lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # A relative import stays inside its own package.
            yield path.parent.name if node.level else node.module or "", id(node) not in lazy


def entry_points(plugin: Path) -> dict[str, dict[str, str]]:
    """The entry points of a package, by group: plugins in `llmtune`, commands in `llmtune.commands`."""
    return tomllib.loads((plugin / "pyproject.toml").read_text())["project"]["entry-points"]


@cache
def plugin_packages() -> set[str]:
    return {entry.name for plugin in PLUGINS for entry in plugin.glob("llmtune_*") if entry.is_dir()}


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.stem)
def test_the_core_never_imports_a_plugin(path: Path) -> None:
    found = {name.split(".")[0] for name, _ in imports(path)}
    assert not found & plugin_packages()
    assert not found & {"peft", "bitsandbytes", "liger_kernel", "flash_attn"}


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda path: path.name)
def test_a_plugin_imports_only_the_public_names(plugin: Path) -> None:
    (own,) = (entry.name for entry in plugin.glob("llmtune_*") if entry.is_dir())
    for path in (plugin / own).rglob("*.py"):
        for name, _ in imports(path):
            top = name.split(".")[0]
            assert name == "llmtune" or top != "llmtune", f"{path}: imports {name}"
            assert top == own or top not in plugin_packages(), f"{path}: imports the plugin {name}"


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda path: path.name)
def test_a_plugins_tests_use_what_every_author_has(plugin: Path) -> None:
    (own,) = (entry.name for entry in plugin.glob("llmtune_*") if entry.is_dir())
    for path in (plugin / "tests").rglob("*.py"):
        for name, _ in imports(path):
            top = name.split(".")[0]
            assert name in ("llmtune", "llmtune.testing") or top != "llmtune", f"{path}: imports {name}"
            assert top != "tests" or name == path.parent.name, f"{path}: imports {name}"
            assert top == own or top not in plugin_packages(), f"{path}: imports the plugin {name}"


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda path: path.name)
def test_a_plugin_is_tested_by_its_contract(plugin: Path) -> None:
    """Every name it offers stands beside its extension point in a call of `laws`."""
    told = "".join(path.read_text(encoding="utf-8") for path in (plugin / "tests").glob("test_*.py"))
    names = entry_points(plugin).get("llmtune", {})
    assert "laws(" in told or not names
    assert [name for name in names if f'"{name}"' not in told] == []


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda path: path.name)
def test_a_plugins_entry_module_is_light(plugin: Path) -> None:
    (own,) = (entry for entry in plugin.glob("llmtune_*") if entry.is_dir())
    heavy = {"torch", "transformers", "peft", "bitsandbytes", "liger_kernel", "numpy", "matplotlib"}
    eager = {name.split(".")[0] for name, now in imports(own / "__init__.py") if now}
    assert not eager & heavy


def test_the_contract_imports_nothing_of_llmtune_but_itself() -> None:
    for name in CONTRACT:
        path = ROOT / (name.replace(".", "/") + ".py")
        for module, eager in imports(path):
            assert not module.startswith("llmtune") or module in CONTRACT, f"{path} imports {module}"
            assert not (eager and module.split(".")[0] in {"torch", "transformers"}), f"{path} imports {module} eagerly"


def test_the_core_does_not_spell_a_plugins_name() -> None:
    names = {name for plugin in PLUGINS for name in entry_points(plugin).get("llmtune", {})}
    # Words that mean other things too, such as shapes of rows, libraries, keys of recipes and of tool calls.
    common = {
        "auto", "linear", "cosine", "constant", "pt", "kto", "transformers", "model", "function", "generate",
        "accuracy", "peft", "vllm",
    }  # fmt: skip
    texts = {
        path: {node.value for node in nodes(path) if isinstance(node, ast.Constant)}
        for path in CORE
        if path.parent.name != "conversion"  # translates other trainers' words, and has to write ours
    }
    said = {f"{path.name}: {name}" for path, strings in texts.items() for name in (names - common) & strings}
    assert not said


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("torch.distributed.fsdp", {"fsdp2.py"}),
        ("pluggy", {"hookspecs.py", "registry.py"}),
    ],
)
def test_only_one_place_knows(module: str, allowed: set[str]) -> None:
    users = {path.name for path in CORE for name, _ in imports(path) if name == module}
    assert users <= allowed


def test_only_the_command_line_parses_arguments() -> None:
    users = {path.parent.name for path in CORE for name, _ in imports(path) if name == "argparse"}
    assert users == {"cli"}


def test_a_model_is_looked_for_on_the_recipes_hub() -> None:
    calls = [
        (path, node)
        for path in CORE
        for node in nodes(path)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "resolve_model"
    ]
    assert calls and not [f"{path}:{node.lineno}" for path, node in calls if len(node.args) != 2]


def test_no_file_is_long() -> None:
    files = [*CORE, *(path for plugin in PLUGINS for path in plugin.rglob("*.py")), *(ROOT / "tests").rglob("*.py")]
    assert not [f"{path}: {n}" for path in files if (n := len(path.read_text().splitlines())) > 400]


def test_no_function_is_long() -> None:
    long = [
        f"{path.name}: {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for path in [*CORE, *(path for plugin in PLUGINS for path in plugin.glob("llmtune_*/**/*.py"))]
        for node in nodes(path)
        if isinstance(node, ast.FunctionDef) and node.end_lineno and node.end_lineno - node.lineno >= 70
    ]
    assert not long


def test_importing_llmtune_loads_almost_nothing() -> None:
    code = (
        "import sys; before = set(sys.modules); import llmtune; new = set(sys.modules) - before\n"
        "print([name for name in new if 'site-packages' in (getattr(sys.modules[name], '__file__', None) or '')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
