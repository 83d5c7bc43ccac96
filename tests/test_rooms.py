"""The rooms of the core and their order: who may import whom, counting every import, and what else a house needs.

A room may import itself and the rooms before it. Annotations (`if TYPE_CHECKING`), imports inside functions and
`from llmtune import train` count like any other import.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tests.test_rules import nodes

ROOT = Path(__file__).parent.parent
ROOMS = {
    "folders": "Where llmtune keeps what it makes.",
    "terminal": "How wide the terminal is, and what is being done now.",
    "contract": "All that a plugin may import: records, protocols, hooks, errors, the reader of dataclasses.",
    "distributed": "Who this process is and which piece of a tensor it holds; every kind of parallelism; launching.",
    "model": "Files become an edited, filled model; and text comes out of it.",
    "media": "Pictures, video and sound: found, opened, and given to a model's own processor.",
    "data": "Rows become batches.",
    "recipe": "YAML becomes typed keys and found plugins.",
    "conversion": "Files of other trainers become recipes.",
    "planning": "All that is decided before a weight is read.",
    "training": "The loop, its objective, what happens between steps, checkpoints, the run's folder.",
    "history": "Runs on disk: found, read, compared and drawn.",
    "doctor": "What this machine has, what is wrong with it, and what to do.",
    "cost": "What a step of a plan takes, and what to change where it does not fit.",
    "inference": "What was trained: reopened, talked to, exported; and a look at data as training has them.",
    "serving": "An API like OpenAI's for what was trained.",
    "api": "The Python API.",
    "cli": "The command line.",
}
"""In their order. `testing`, the laws for authors of plugins, stands beside them and may import all but `cli`."""

DEFERRED = {
    "start-up": "`import llmtune`, `--help`, `plugins`, `schema`, `llmtune.testing` and entry modules load no torch.",
    "tokenizer": "Looking at data takes a tokenizer; torch and the rest of training stay out of it.",
    "may be absent": "The package is an extra, belongs to another system, or has the module in newer versions only.",
}
"""Why an import may stand inside a function: the only reasons there are."""
TOKENIZER_FILES = {
    f"llmtune.{name}"
    for name in (
        "inference.inspect",
        "media.beside",
        "media.by_size",
        "media.loading",
        "media.opening",
        "media.processor",
        "media.read",
        "model.source",
        "model.gguf",
        "model.hub",
        "model.huggingface",
        "model.skeleton",
        "model.weight_files",
    )
}
"""Files outside of `data` that looking at data takes."""
MAY_BE_ABSENT = {
    "PIL",
    "av",
    "matplotlib",
    "rich",
    "tqdm",
    "fcntl",
    "readline",
    "IPython",
    "transformers.distributed.expert_parallel",
}


class Import(NamedTuple):
    """One imported module."""

    module: str
    line: int
    deferred: bool
    """Whether it stands inside a function."""


@cache
def modules() -> Mapping[str, Path]:
    """Every file of the core by its module's name."""
    found = {}
    for path in sorted((ROOT / "llmtune").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def public() -> Mapping[str, str]:
    """The names of `llmtune` that lead to other modules."""
    import llmtune

    return llmtune._WHERE


@cache
def imports(module: str) -> tuple[Import, ...]:
    """All that a module imports, wherever it stands in the file; a submodule by its own name."""
    inside = {
        id(node)
        for outer in nodes(modules()[module])
        if isinstance(outer, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(outer)
    }
    return tuple(
        Import(name, node.lineno, id(node) in inside)
        for node in nodes(modules()[module])
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in _names(module, node)
    )


def _names(module: str, node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    base = node.module or ""
    if node.level:
        package = module if modules()[module].name == "__init__.py" else module.rpartition(".")[0]
        base = ".".join([*package.split(".")[: len(package.split(".")) - node.level + 1], *filter(None, [node.module])])
    for alias in node.names:
        whole = f"{base}.{alias.name}"
        yield whole if whole in modules() else public().get(alias.name, base) if base == "llmtune" else base


def room(module: str) -> str | None:
    """The room that a module is in; None for the package itself, `__main__` and `testing`."""
    name = module.split(".")[1] if "." in module else ""
    return name if name in ROOMS else None


def test_every_module_is_in_a_room() -> None:
    strange = {name for name in modules() if room(name) is None and name.split(".")[1:2] not in ([], ["testing"])}
    assert strange == {"llmtune.__main__"}


def test_no_room_imports_a_later_one() -> None:
    order = list(ROOMS)
    found = {
        (module, each.module)
        for module in modules()
        for each in imports(module)
        if (here := room(module)) and (there := room(each.module)) and order.index(there) > order.index(here)
    }
    assert not found


def test_nothing_imports_the_laws_or_the_command_line() -> None:
    for module in modules():
        names = {each.module for each in imports(module)}
        # `plugins new` and `plugins check` are the laws' own commands.
        if not module.startswith("llmtune.testing") and module != "llmtune.cli.extend":
            assert not [name for name in names if name.startswith("llmtune.testing")], module
        if room(module) != "cli" and module != "llmtune.__main__":
            assert not [name for name in names if name.startswith("llmtune.cli")], module


def test_no_files_import_each_other_in_a_circle() -> None:
    graph = {module: {each.module for each in imports(module)} & set(modules()) - {module} for module in modules()}
    assert not list(circles(graph))


def circles(graph: Mapping[str, set[str]]) -> Iterator[frozenset[str]]:
    """Groups of several modules each of which leads to every other (strongly connected components)."""
    reached = {module: _reached(graph, module) for module in graph}
    seen: set[str] = set()
    for module in graph:
        group = frozenset(other for other in reached[module] if module in reached[other])
        if module not in seen and len(group) > 1:
            seen |= group
            yield group


def _reached(graph: Mapping[str, set[str]], module: str) -> set[str]:
    found, waiting = set(), [module]
    while waiting:
        for other in graph[waiting.pop()] - found:
            found.add(other)
            waiting.append(other)
    return found


def test_a_circle_is_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d"}}
    assert list(circles(graph)) == [frozenset({"b", "c"})]


def test_a_class_has_a_name_of_its_own() -> None:
    places: dict[str, set[Path]] = {}
    files = [*modules().values(), *(path for path in (ROOT / "plugins").glob("*/llmtune_*/**/*.py"))]
    for path in files:
        for node in nodes(path):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name.lstrip("_"), set()).add(path)
    assert not {name for name, paths in places.items() if len(paths) > 1}


@cache
def light() -> frozenset[str]:
    """Modules of the core that start-up loads."""
    code = (
        "import sys, io, contextlib\nimport llmtune, llmtune.api\nfrom llmtune.cli import main\n"
        "for command in (['--help'], ['plugins'], ['schema']):\n"
        "    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "        main(command)\n"
        "print(*(name for name in sys.modules if name.partition('.')[0] == 'llmtune'))"
    )
    with tempfile.TemporaryDirectory() as cache:  # in which nothing is remembered
        env = {**os.environ, "LLMTUNE_CACHE": cache}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    return frozenset(done.stdout.split())


def reason(module: str, imported: str) -> str | None:
    """Why an import may stand inside a function; None where it may not."""
    if imported in MAY_BE_ABSENT or imported.partition(".")[0] in MAY_BE_ABSENT:
        return "may be absent"
    if module in light() and (imported not in light() or room(module) in ("api", "cli")):
        return "start-up"
    if room(module) == "contract":  # entry modules of plugins take names from there
        return "start-up"
    if module.startswith("llmtune.testing") and not module.startswith("llmtune.testing.points"):
        return "start-up"
    if room(module) == "data" or module in TOKENIZER_FILES:
        return "tokenizer"
    return None


def test_an_import_inside_a_function_has_a_reason() -> None:
    deferred = [(module, each) for module in modules() for each in imports(module) if each.deferred]
    lines = [f"{module}:{each.line} {each.module}" for module, each in deferred if not reason(module, each.module)]
    assert not lines, "\n".join(lines)
    assert {reason(module, each.module) for module, each in deferred} - {None} == set(DEFERRED)


FOREIGN = {
    f"llmtune.{name}"
    for name in (
        "contract.structure", "cost.trace", "data.reading.hub", "data.render", "distributed.activation_checkpointing",
        "distributed.context_parallel", "distributed.expert_parallel", "distributed.tensor_parallel",
        "model.huggingface", "model.precision", "model.sizes", "model.skeleton", "model.tying",
        "planning.memory_formulas", "planning.objections", "planning.spreading",
        "training.isolation", "training.objective",
    )
}  # fmt: skip
"""Readers of objects of transformers, torch and the hub, whose attributes depend on the model and the version."""
QUESTIONS_PER_1000_LINES = 1
"""`getattr` and `hasattr` elsewhere: names that are looked up by a table, and the system, for the most part."""


def test_objects_of_our_own_are_not_asked_what_they_have() -> None:
    lines, questions = 0, 0
    for module, path in modules().items():
        calls = [node.func for node in nodes(path) if isinstance(node, ast.Call)]
        names = [call.id for call in calls if isinstance(call, ast.Name)]
        lines += len(path.read_text(encoding="utf-8").splitlines())
        questions += sum(name in ("getattr", "hasattr") for name in names) if module not in FOREIGN else 0
    assert questions <= QUESTIONS_PER_1000_LINES * lines / 1000
