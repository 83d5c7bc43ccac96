"""What others install: wheels and source archives of the core and of each plugin, built and tried outside this tree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[1]
PLUGINS = sorted(path.parent for path in (ROOT / "plugins").glob("*/pyproject.toml"))
PACKAGES = [ROOT, *PLUGINS]
packages = pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name if path != ROOT else "core")


def project_of(package: Path) -> dict[str, Any]:
    return tomllib.loads((package / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def module_of(package: Path) -> Path:
    (module,) = [ROOT / "llmtune"] if package == ROOT else list(package.glob("llmtune_*"))
    return module


def tracked(folder: Path) -> set[str]:
    """Files of a module's folder, named from the folder that it lies in; caches are none of them."""
    files = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {path.relative_to(folder.parent).as_posix() for path in files}


@cache
def version_of_the_core() -> str:
    return project_of(ROOT)["version"]


@packages
def test_a_package_says_what_an_index_shows(package: Path) -> None:
    project = project_of(package)
    assert project["license"] == "Apache-2.0" and project["license-files"] == ["LICENSE"]
    assert (package / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert project["readme"] == "README.md" and (package / "README.md").read_text(encoding="utf-8").strip()
    assert project["requires-python"] == ">=3.11"
    assert "llmtune" in project["description"] or package == ROOT
    assert project["version"] == version_of_the_core()
    if package != ROOT:
        major, minor, *_ = map(int, version_of_the_core().split("."))
        assert f"llmtune>={major}.{minor},<{major}.{minor + 1}" in project["dependencies"]


@packages
def test_wheel_and_source_archive_hold_all_of_the_package_and_no_tests(package: Path, tmp_path: Path) -> None:
    (wheel,) = WheelBuilder(str(package)).build(directory=str(tmp_path), versions=["standard"])
    (archive,) = SdistBuilder(str(package)).build(directory=str(tmp_path))
    module = module_of(package)
    expected = tracked(module)
    assert f"{module.name}/py.typed" in expected
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    with tarfile.open(archive) as opened:
        inside = {name.partition("/")[2] for name in opened.getnames()}
    assert inside == expected | {"LICENSE", "README.md", "pyproject.toml", "PKG-INFO", ".gitignore"}


def test_an_installed_wheel_works_without_the_source_tree(tmp_path: Path) -> None:
    chosen = ROOT / "plugins" / "schedules"
    wheels = [
        next(WheelBuilder(str(package)).build(directory=str(tmp_path), versions=["standard"]))
        for package in (ROOT, chosen)
    ]
    target = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    subprocess.run([*pip, "--target", str(target), *wheels], check=True)
    # Without site (-S) no .pth file leads back to this tree; the core's dependencies come by their folder.
    path = os.pathsep.join([str(target), str(Path(yaml.__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}

    def llmtune(*words: str) -> str:
        command = [sys.executable, "-S", str(target / "bin" / "llmtune"), *words]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout

    assert "COMMAND" in llmtune("--help")
    rows = json.loads(llmtune("plugins", "--json"))["plugins"]
    found = {row["name"]: row["state"] for row in rows if row["package"] == "llmtune-schedules"}
    assert found == dict.fromkeys(project_of(chosen)["entry-points"]["llmtune"], "ok")
    where = "import llmtune, llmtune_schedules as other; print(llmtune.__file__, other.__file__)"
    said = subprocess.run(
        [sys.executable, "-S", "-c", where], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert [Path(file).is_relative_to(target) for file in said.split()] == [True, True]
